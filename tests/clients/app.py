"""A model server as an ASGI application, with no framework: what uvicorn serves in the client tests.

Speaks /v1/chat/completions, /v1/models, /v1/embeddings, /api/chat, /api/generate and /api/tags. As with tests/model.py,
X-Test-Events and X-Test-Gap-Ms say how many events a stream has and how far apart they are.
"""

import asyncio
import json


class Request:
    def __init__(self, scope, body):
        self.headers = dict(scope["headers"])
        self.json = json.loads(body or b"{}")
        self.events = self.knob(b"x-test-events", 5)
        self.gap = self.knob(b"x-test-gap-ms", 10) / 1000

    def knob(self, name, default):
        return int(self.headers.get(name, default))


async def read_body(receive):
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def answer(send, status, value):
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def stream(send, receive, kind, events, gap):
    """Send the events one by one, and stop as soon as the other side is gone."""
    gone = asyncio.ensure_future(receive())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.wait([gone], timeout=gap)
        if gone.done():
            return
    gone.cancel()
    await send({"type": "http.response.body", "body": b""})


def sse(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def openai_chunk(delta, finish=None):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "stand-in", "choices": [choice]}


def openai_events(count):
    for i in range(count):
        yield sse(openai_chunk({"role": "assistant", "content": f"w{i} "}))
    yield sse(openai_chunk({}, "stop"))
    yield b"data: [DONE]\n\n"


def openai_completion():
    message = {"role": "assistant", "content": "hello from the model"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "stand-in", "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def ollama_part(field, text, done):
    part = {"model": "stand-in", "created_at": "2026-01-01T00:00:00Z", "done": done}
    part[field] = {"role": "assistant", "content": text} if field == "message" else text
    if done:
        part |= {"done_reason": "stop", "prompt_eval_count": 3, "eval_count": 4}
    return part


def ollama_events(field, count):
    for i in range(count):
        yield json.dumps(ollama_part(field, f"w{i} ", False)).encode() + b"\n"
    yield json.dumps(ollama_part(field, "", True)).encode() + b"\n"


async def chat_completions(request, receive, send):
    if request.json.get("stream"):
        await stream(send, receive, b"text/event-stream", openai_events(request.events), request.gap)
    else:
        await answer(send, 200, openai_completion())


async def ollama(field, request, receive, send):
    if request.json.get("stream", True):
        await stream(send, receive, b"application/x-ndjson", ollama_events(field, request.events), request.gap)
    else:
        await answer(send, 200, ollama_part(field, "hello from the model", True))


MODELS = {"object": "list", "data": [{"id": "stand-in", "object": "model", "created": 1, "owned_by": "tests"}]}
TAGS = {"models": [{"name": "stand-in", "model": "stand-in", "size": 1, "digest": "0"}]}
EMBEDDINGS = {"object": "list", "model": "stand-in", "usage": {"prompt_tokens": 1, "total_tokens": 1},
              "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]}


async def route(method, path, request, receive, send):
    if method == "GET" and path == "/v1/models":
        await answer(send, 200, MODELS)
    elif method in ("GET", "HEAD") and path == "/api/tags":
        await answer(send, 200, TAGS)
    elif path == "/v1/embeddings":
        await answer(send, 200, EMBEDDINGS)
    elif path == "/v1/chat/completions":
        await chat_completions(request, receive, send)
    elif path == "/api/chat":
        await ollama("message", request, receive, send)
    elif path == "/api/generate":
        await ollama("response", request, receive, send)
    else:
        await answer(send, 404, {"error": "no such path here"})


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = await read_body(receive)
    if body is not None:
        await route(scope["method"], scope["path"], Request(scope, body), receive, send)
