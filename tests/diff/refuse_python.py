"""A real server of uvicorn. Usage: refuse_python.py h11|httptools serving|loading RECORD; what it does is told in refusals.py."""

import asyncio
import logging
import os
import socket
import sys
import threading

import uvicorn


def application(loading, record):
    async def serve(scope, receive, send):
        run = dict(scope["headers"]).get(b"x-run", b"-")
        path = scope["path"][:80].encode()
        os.write(record, b"%b %b %b\n" % (scope["method"].encode(), path, run))
        status = 503 if loading else 415 if scope["path"] == "/early" else 200
        while status == 200 and (await receive()).get("more_body"):
            pass
        body = b'{"run":"%b","target":"%b"}' % (run, path)
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})
    return serve


async def main():
    parser, mode, path = sys.argv[1:]
    record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(uvicorn.Config(application(mode == "loading", record), http=parser, ws="none", lifespan="off",
                                           log_level="warning", access_log=False))
    # what it says of an upgrade that it does not do is not told
    logging.getLogger("uvicorn.error").addFilter(lambda line: not any(word in line.getMessage() for word in ("upgrade", "WebSocket")))
    print(listener.getsockname()[1], flush=True)

    def wait():
        sys.stdin.buffer.read()
        server.should_exit = True
    threading.Thread(target=wait, daemon=True).start()
    await server.serve(sockets=[listener])


asyncio.run(main())
