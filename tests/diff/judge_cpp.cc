// The judge cpp-httplib, the server under llama-server. Frames and lines are as in judge_python.py, but `!` may stand
// anywhere: this server answers 400 to what it cannot read and goes on with the bytes that follow.
#include <httplib.h>

#include <arpa/inet.h>
#include <cstdio>
#include <cstring>
#include <string>

// What a client sent on one connection; its end is the end of the bytes.
class Recorded : public httplib::Stream {
public:
    explicit Recorded(const std::string &data) : data_(data) {}
    bool more() const { return at_ < data_.size(); }
    bool is_readable() const override { return true; }
    bool is_writable() const override { return true; }
    ssize_t read(char *space, size_t size) override {
        size = std::min(size, data_.size() - at_);
        memcpy(space, data_.data() + at_, size);
        at_ += size;
        return static_cast<ssize_t>(size);
    }
    ssize_t write(const char *, size_t size) override { return static_cast<ssize_t>(size); }
    void get_remote_ip_and_port(std::string &ip, int &port) const override { ip = "127.0.0.1"; port = 1; }
    void get_local_ip_and_port(std::string &ip, int &port) const override { ip = "127.0.0.1"; port = 1; }
    socket_t socket() const override { return 0; }

private:
    const std::string &data_;
    size_t at_ = 0;
};

static std::string hex(const std::string &text) {
    std::string out;
    char two[3];
    for (unsigned char c : text) {
        snprintf(two, sizeof two, "%02x", c);
        out += two;
    }
    return out;
}

class Judge : public httplib::Server {
public:
    Judge() {
        Handler keep = [this](const httplib::Request &request, httplib::Response &) {
            line_ += hex(request.method) + "," + hex(request.target) + "," + hex(request.get_header_value("Host")) + "," +
                     hex(request.body) + " ";
            kept_ = true;
        };
        Get(".*", keep);
        Post(".*", keep);
        Put(".*", keep);
        Patch(".*", keep);
        Delete(".*", keep);
        Options(".*", keep);
    }

    // As the library's own loop over a kept-alive connection; what comes after a request that closes it is not read.
    std::string read(const std::string &data) {
        Recorded stream(data);
        bool closed = false;
        line_.clear();
        while (stream.more() && !closed) {
            kept_ = false;
            bool good = process_request(stream, false, closed, nullptr);
            if (!kept_) line_ += "! ";
            if (!good) break;
        }
        return line_ + (stream.more() && !closed ? "!" : ".");
    }

private:
    std::string line_;
    bool kept_ = false;
};

int main() {
    Judge judge;
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        std::string data(ntohl(length), '\0');
        if (fread(&data[0], 1, data.size(), stdin) != data.size()) return 1;
        puts(judge.read(data).c_str());
        fflush(stdout);
    }
}
