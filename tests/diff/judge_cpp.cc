// The judge cpp-httplib, the server under llama-server. Usage: judge_cpp serving|loading; loading, it answers each request
// before it has looked at the body. Frames and lines are as in judge_python.py, but `!` may stand anywhere: this server
// answers 400 to what it cannot read and goes on with the bytes that follow. -DFIRST=1: for 0.11, whose interface is another.
#include <httplib.h>

#include <arpa/inet.h>
#include <cstdio>
#include <cstring>
#include <string>

// What a client sent on one connection, from `at` on; its end is the end of the bytes. As in the library's own stream, which
// is another one for each request, bytes are taken in blocks, and what is left of a block is lost with the stream.
class Recorded : public httplib::Stream {
public:
    Recorded(const std::string &data, size_t &at) : data_(data), at_(at), next_(at) {}
    bool is_readable() const override { return true; }
    virtual bool is_writable() const { return true; }       // some releases have these, some do not
    virtual bool wait_readable() const { return true; }
    virtual bool wait_writable() const { return true; }
    virtual time_t duration() const { return 0; }
    ssize_t read(char *space, size_t size) override {
        if (next_ == at_) at_ += std::min(BLOCK, data_.size() - at_);
        size = std::min(size, at_ - next_);
        memcpy(space, data_.data() + next_, size);
        next_ += size;
        return static_cast<ssize_t>(size);
    }
    ssize_t write(const char *, size_t size) override { return static_cast<ssize_t>(size); }
    void get_remote_ip_and_port(std::string &ip, int &port) const override { ip = "127.0.0.1"; port = 1; }
    void get_local_ip_and_port(std::string &ip, int &port) const override { ip = "127.0.0.1"; port = 1; }
    socket_t socket() const override { return 0; }

private:
    static constexpr size_t BLOCK = 4096;
    const std::string &data_;
    size_t &at_;        // where the next block begins
    size_t next_;       // the next byte
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
    explicit Judge(bool loading) {
        Handler keep = [this](const httplib::Request &request, httplib::Response &) {
            line_ += hex(request.method) + "," + hex(request.target) + "," + hex(request.get_header_value("Host")) + "," +
                     hex(request.body) + " ";
            kept_ = true;
        };
        if (loading) {
            set_pre_routing_handler([keep](const httplib::Request &request, httplib::Response &response) {
                keep(request, response);
                response.status = 503;
                return HandlerResponse::Handled;
            });
        }
        Get(".*", keep);
        Post(".*", keep);
        Put(".*", keep);
        Patch(".*", keep);
        Delete(".*", keep);
        Options(".*", keep);
    }

    // As the library's own loop over a kept-alive connection; what comes after a request that closes it is not read.
    std::string read(const std::string &data) {
        size_t at = 0;
        bool closed = false;
        line_.clear();
        while (at < data.size() && !closed) {
            Recorded stream(data, at);
            kept_ = false;
#if FIRST
            bool good = process_request(stream, false, closed, nullptr);
#else
            bool good = process_request(stream, "127.0.0.1", 1, "127.0.0.1", 1, false, closed, nullptr);
#endif
            if (!kept_) line_ += "! ";
            if (!good) break;
        }
        return line_ + (at < data.size() && !closed ? "!" : ".");
    }

private:
    std::string line_;
    bool kept_ = false;
};

int main(int, char **argv) {
    Judge judge(!strcmp(argv[1], "loading"));
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        std::string data(ntohl(length), '\0');
        if (fread(&data[0], 1, data.size(), stdin) != data.size()) return 1;
        puts(judge.read(data).c_str());
        fflush(stdout);
    }
}
