// A real server of cpp-httplib, as llama-server is one: it answers many requests without reading their bodies.
// Usage: refuse_cpp serving|loading RECORD; what it does is told in refusals.py.
// Compiled with a backlog of 512, as llama.cpp does: with the library's own 5 the kernel resets whom it cannot keep.
#define CPPHTTPLIB_LISTEN_BACKLOG 512
#include <httplib.h>

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

static int record;
static thread_local bool parsed;

static void put(const std::string &line) {
    std::string whole = line + "\n";
    if (write(record, whole.data(), whole.size()) != static_cast<ssize_t>(whole.size())) abort();
}

static std::string run_of(const httplib::Request &request) {
    return request.has_header("X-Run") ? request.get_header_value("X-Run") : "-";
}

static void answer(const httplib::Request &request, httplib::Response &response, int status) {
    response.status = status;
    response.set_content("{\"run\":\"" + run_of(request) + "\",\"target\":\"" + request.path.substr(0, 80) + "\"}", "application/json");
}

int main(int, char **argv) {
    bool loading = !strcmp(argv[1], "loading");
    record = open(argv[2], O_WRONLY | O_CREAT | O_APPEND, 0600);
    httplib::Server server;
    server.new_task_queue = [] { return new httplib::ThreadPool(32); };
    server.set_keep_alive_max_count(100);       // what newer ones have by themselves
    server.set_payload_max_length(1 << 20);

    server.set_pre_routing_handler([&](const httplib::Request &request, httplib::Response &response) {
        parsed = true;
        put(request.method + " " + request.target.substr(0, 80) + " " + run_of(request));
        if (!loading) return httplib::Server::HandlerResponse::Unhandled;
        answer(request, response, 503);
        return httplib::Server::HandlerResponse::Handled;
    });
    // Called for each answer: also for one to what was no request.
    server.set_logger([](const httplib::Request &request, const httplib::Response &response) {
        if (!parsed) put("! " + std::to_string(response.status) + " " + run_of(request));
        parsed = false;
    });

    httplib::Server::HandlerWithContentReader early = [](const httplib::Request &request, httplib::Response &response,
                                                         const httplib::ContentReader &) { answer(request, response, 415); };
    server.Post("/early", early);
    server.Put("/early", early);
    server.Patch("/early", early);
    server.Delete("/early", early);
    httplib::Server::Handler serve = [](const httplib::Request &request, httplib::Response &response) { answer(request, response, 200); };
    server.Get("/.*", serve);
    server.Post("/.*", serve);
    server.Put("/.*", serve);
    server.Patch("/.*", serve);
    server.Delete("/.*", serve);
    server.Options("/.*", serve);

    int port = server.bind_to_any_port("127.0.0.1");
    if (port < 0) return 1;
    std::thread waiting([&] {
        while (getchar() != EOF) {}
        server.stop();
    });
    printf("%d\n", port);
    fflush(stdout);
    server.listen_after_bind();
    waiting.join();
}
