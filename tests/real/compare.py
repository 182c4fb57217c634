"""Direct against through: one request to the model server itself and one through tinyauth, and whether the answers are alike.

Alike are: the interim answers, the status, how the body is framed, the fields with their values, the shape of the body; of an
error every word. What may differ stands in UNLIKE, with the reason; what stands there and no longer differs is an error too.
"""

import contextlib
import json
import re
import threading

from e2e import ALICE, Client, Cut, request

MEGABYTE = 1 << 20
CHANGING = {"id", "request_id", "created", "created_at", "modified_at", "completed_at", "timings", "item_id"}

# Fields that are not compared, and why.
HOP = {"connection": "each connection is its own", "keep-alive": "each connection is its own", "date": "two answers, two times",
       "transfer-encoding": "compared as framing", "content-length": "compared as framing; its value as the body's length",
       "x-request-id": "added by tinyauth to every answer",
       "x-accel-buffering": "added by tinyauth to streams; a test of its own looks at it", "process-start-time-unix": "counts on"}


class Case:
    def __init__(self, name, method, target, body=None, *fields, chunked=False, expect=False):
        self.name, self.method, self.target, self.fields = name, method, target, list(fields)
        self.body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.chunked, self.expect = chunked, expect
        if self.body is not None:
            self.fields.append("Content-Type: application/json")
        if expect:
            self.fields.append("Expect: 100-continue")


class Result:
    """What a client saw."""

    def __init__(self, interim, answer, method, how):
        self.interim = [one.status for one in interim]
        self.status, self.body = answer.status, answer.body
        length = answer.get("Content-Length")
        self.framing = "chunked" if answer.chunked else "length" if length is not None else "close" if how == "close" else "none"
        if method == "HEAD" or answer.status in (204, 304):
            self.framing = f"no body, {self.framing} said"
        self.fields = sorted((name.lower(), value) for name, value in answer.fields if name.lower() not in HOP)
        self.type = (answer.get("Content-Type") or "").partition(";")[0]
        self.shape = shape_of(self.type, self.status, self.body)

    def about(self):
        return {"interim answers": self.interim, "status": self.status, "framing": self.framing, "fields": self.fields,
                "shape": self.shape}


def shape(value, words):
    """A JSON value without what changes from call to call. `words`: with its texts and numbers."""
    if isinstance(value, dict):
        return {name: "..." if name in CHANGING else shape(of, words) for name, of in sorted(value.items())}
    if isinstance(value, list):
        return sorted({json.dumps(shape(of, words)) for of in value})
    if words or value is None or isinstance(value, bool):
        return value
    return "text" if isinstance(value, str) else "number"


def shape_of(kind, status, body):
    text = body.decode("utf-8", "replace")
    if kind in ("application/json", "application/x-ndjson", "text/event-stream"):
        shapes, words = set(), status >= 400
        pieces = [text] if kind == "application/json" else text.split("\n")
        for piece in pieces:
            name, colon, rest = piece.partition(": ") if kind == "text/event-stream" else ("", "", piece)
            try:
                shapes.add(name + colon + json.dumps(shape(json.loads(rest), words)))
            except ValueError:
                shapes.add(piece)
        return sorted(shapes)
    return re.sub(r"(?m)^(\w+:?\w*) [-\d.e+na]+$", r"\1 number", text)


def exchange(address, host, case, key, client=None):
    """One request and its answer. A body of a megabyte goes out beside the reading: an answer may come before its end."""
    raw = request(case.method, case.target, *case.fields, key=key, host=host, body=case.body, chunked=case.chunked)
    head, _, body = raw.partition(b"\r\n\r\n")
    with contextlib.closing(client or Client(address)) as client:
        client.sock.settimeout(60)
        interim = []
        client.send(head + b"\r\n\r\n")
        answer = client.head() if case.expect else None
        if answer and answer.status == 100:
            interim, answer = [answer], None

        def send():
            with contextlib.suppress(OSError):
                client.send(body)
        sender = threading.Thread(target=send, daemon=True)
        if not answer:
            sender.start()
            while (answer := client.head()).status < 200:
                interim.append(answer)
        client.answer = answer
        framed = answer.chunked or answer.get("Content-Length") is not None
        for piece in client.body(case.method):
            answer.body += piece
        return Result(interim, answer, case.method, "" if framed else "close")


def compare(server, host, through, case):
    """What differs between the two ways, by name: (direct, through)."""
    try:
        straight = exchange(server, host, case, None).about()
    except (Cut, OSError) as error:
        straight = {"end": repr(error)}
    try:
        proxied = exchange(through, "models.test:8080", case, ALICE).about()
    except (Cut, OSError) as error:
        proxied = {"end": repr(error)}
    found = {}
    for what in {**straight, **proxied}:
        if straight.get(what) != proxied.get(what):
            found[what] = (straight.get(what), proxied.get(what))
    return straight, found


CHAT = [{"role": "user", "content": "open the door"}]
TOOLS = [{"type": "function", "function": {"name": "open", "description": "opens", "parameters": {"type": "object", "properties": {}}}}]


def chat(model="tiny", **more):
    return {"model": model, "messages": CHAT, "max_tokens": 12, "seed": 1, "temperature": 0, **more}


def responses(model="tiny", **more):
    return {"model": model, "input": "open the door", "max_output_tokens": 12, "temperature": 0, **more}


def bodies(method, target, body, model="tiny"):
    """The same route with what a client may get wrong in a body."""
    return [
        Case(f"{target} malformed", method, target, b'{"model": "tiny", '),
        Case(f"{target} not an object", method, target, b'"tiny"'),
        Case(f"{target} empty", method, target, b""),
        Case(f"{target} no body", method, target),
        Case(f"{target} empty object", method, target, {}),
        Case(f"{target} wrong model", method, target, {**body, "model": "no-such-model"}),
    ]


def sized(target, name, make, sizes=(1, 20)):
    """Bodies of 1 and 20 MB by length and in chunks, with and without Expect."""
    cases = []
    for size in sizes:
        for chunked in (False, True):
            for expect in (False, True):
                cases.append(Case(f"{name}, {size} MB {'chunked' if chunked else 'by length'}{', Expect' if expect else ''}", "POST",
                                  target, make(size * MEGABYTE), chunked=chunked, expect=expect))
    return cases


def llama_cases():
    generation = [
        ("/completion", {"prompt": "the key", "n_predict": 12, "seed": 1, "temperature": 0}),
        ("/completions", {"prompt": "the key", "n_predict": 12, "seed": 1, "temperature": 0}),
        ("/v1/completions", {"model": "tiny", "prompt": "the key", "max_tokens": 12, "seed": 1, "temperature": 0}),
        ("/chat/completions", chat()),
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream_options={"include_usage": True}, n=1, logprobs=True, top_logprobs=2)),
        ("/v1/responses", responses()),
        ("/responses", responses()),
        ("/v1/messages", chat()),
        ("/infill", {"input_prefix": "the", "input_suffix": "door", "n_predict": 4}),
    ]
    cases = []
    for number, (target, body) in enumerate(generation):
        stream = {**body, "stream": True}
        cases.append(Case(f"{target} whole {number}", "POST", target, {key: of for key, of in body.items() if key != "stream_options"}))
        cases.append(Case(f"{target} stream {number}", "POST", target, stream, "Accept: text/event-stream"))
    for target in ("/completion", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        body = dict(generation)[target]
        cases += bodies("POST", target, body)
        long = {"prompt": "z" * 2500} if "prompt" in body else {"input": "z" * 2500} if "input" in body else \
            {"messages": [{"role": "user", "content": "z" * 2500}]}
        cases.append(Case(f"{target} too long", "POST", target, {**body, **long}))
        cases.append(Case(f"{target} too long, stream", "POST", target, {**body, **long, "stream": True}))
        cases.append(Case(f"GET {target}", "GET", target))
        cases.append(Case(f"HEAD {target}", "HEAD", target))
    cases.append(Case("tools", "POST", "/v1/chat/completions", chat(tools=TOOLS, tool_choice="auto")))
    cases.append(Case("image", "POST", "/v1/chat/completions", chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}])))
    for target, body in (
            ("/tokenize", {"content": "the door"}), ("/detokenize", {"tokens": [260, 261]}), ("/apply-template", {"messages": CHAT}),
            ("/v1/messages/count_tokens", {"model": "tiny", "messages": CHAT}),
            ("/v1/chat/completions/input_tokens", {"model": "tiny", "messages": CHAT}),
            ("/chat/completions/input_tokens", {"model": "tiny", "messages": CHAT}),
            ("/v1/responses/input_tokens", responses()), ("/responses/input_tokens", responses()),
            ("/embedding", {"content": "door"}), ("/embeddings", {"input": "door"}), ("/v1/embeddings", {"model": "tiny", "input": "door"}),
            ("/rerank", {"query": "door", "documents": ["a"]}), ("/v1/rerank", {"query": "door", "documents": ["a"]}),
            ("/v1/reranking", {"query": "door", "documents": ["a"]}), ("/reranking", {"query": "door", "documents": ["a"]}),
            ("/v1/audio/transcriptions", {}), ("/audio/transcriptions", {}), ("/v1/systemone", {}), ("/predict", {}),
            ("/v1/chat/completions/control", {}), ("/v1/streams/lookup", {}), ("/props", {}), ("/lora-adapters", []),
            ("/slots/0?action=erase", {}), ("/slots/0?action=save", {"filename": "x"}), ("/models", {}),
            ("/models/load", {"model": "tiny"}), ("/models/unload", {"model": "tiny"}), ("/tools", {}), ("/cors-proxy", {}), ("/mcp", {})):
        cases.append(Case(f"POST {target}", "POST", target, body))
    for target in ("/", "/index.html", "/health", "/v1/health", "/models", "/v1/models", "/v1/models/tiny", "/props",
                   "/lora-adapters", "/slots", "/metrics", "/v1/streams", "/v1/stream", "/v1/stream/x", "/models/sse", "/tools",
                   "/cors-proxy", "/no-such-route",
                   "/v1/no-such-route", "/api/tags", "/v1/models/"):
        cases.append(Case(f"GET {target}", "GET", target))
        cases.append(Case(f"HEAD {target}", "HEAD", target))
    cases += [Case(f"{method} /v1/models", method, "/v1/models") for method in ("PUT", "DELETE", "PATCH", "OPTIONS")]
    cases.append(Case("DELETE /models", "DELETE", "/models"))
    cases.append(Case("DELETE /v1/stream/x", "DELETE", "/v1/stream/x"))
    cases.append(Case("not modified", "GET", "/", None, 'If-None-Match: W/"6ad637a0-7a8"'))
    cases.append(Case("range", "GET", "/", None, "Range: bytes=0-9"))
    cases.append(Case("gzip", "GET", "/", None, "Accept-Encoding: gzip"))
    cases.append(Case("OPTIONS with Origin", "OPTIONS", "/v1/chat/completions", None, "Access-Control-Request-Method: POST"))
    cases += sized("/apply-template", "template", lambda size: json.dumps(
        {"messages": [{"role": "user", "content": "door " * (size // 5)}]}).encode(), sizes=[1])
    cases += sized("/v1/chat/completions", "stuffed chat", lambda size: json.dumps(chat(stream=True, user="x" * size)).encode(), sizes=[1])
    cases += sized("/tokenize", "stuffed tokenize", lambda size: json.dumps({"content": "x", "user": "x" * size}).encode(), sizes=[20])
    cases += sized("/v1/no-such-route", "unknown route", lambda size: b"x" * size)
    return cases


def llama_embedding_cases():
    return [
        Case("embedding", "POST", "/embedding", {"content": "door"}),
        Case("embeddings", "POST", "/embeddings", {"input": "door"}),
        Case("v1 embeddings", "POST", "/v1/embeddings", {"model": "tiny", "input": ["door", "wall"]}),
        Case("v1 embeddings base64", "POST", "/v1/embeddings", {"model": "tiny", "input": "door", "encoding_format": "base64"}),
        Case("300 inputs", "POST", "/v1/embeddings", {"model": "tiny", "input": ["door"] * 300}),
        Case("too long an input", "POST", "/v1/embeddings", {"model": "tiny", "input": "z" * 2500}),
        Case("no input", "POST", "/v1/embeddings", {"model": "tiny"}),
        Case("chat", "POST", "/v1/chat/completions", chat()),
        Case("rerank", "POST", "/v1/rerank", {"query": "door", "documents": ["a", "b"]}),
    ]


def ollama_cases():
    options = {"num_predict": 12, "seed": 1, "temperature": 0}
    native = [("/api/generate", {"model": "tiny", "prompt": "the key", "options": options}),
              ("/api/chat", {"model": "tiny", "messages": CHAT, "options": options})]
    others = [("/v1/chat/completions", chat()), ("/v1/completions", {"model": "tiny", "prompt": "the key", "max_tokens": 12, "seed": 1}),
              ("/v1/responses", responses()), ("/v1/messages", chat())]
    cases = []
    for target, body in native + others:
        cases.append(Case(f"{target} whole", "POST", target, {**body, "stream": False}))
        cases.append(Case(f"{target} stream", "POST", target, {**body, "stream": True}))
        cases += bodies("POST", target, body)
        cases.append(Case(f"GET {target}", "GET", target))
        cases.append(Case(f"HEAD {target}", "HEAD", target))
        cases.append(Case(f"{target}/", "POST", target + "/", body))
    cases.append(Case("usage in a stream", "POST", "/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True})))
    cases.append(Case("tools", "POST", "/v1/chat/completions", chat(tools=TOOLS)))
    cases.append(Case("native tools", "POST", "/api/chat", {**native[1][1], "tools": TOOLS, "stream": False}))
    cases.append(Case("cloud model", "POST", "/api/chat", {**native[1][1], "model": "gpt-oss:120b-cloud"}))
    cases.append(Case("raw, no prompt", "POST", "/api/generate", {"model": "tiny"}))
    cases.append(Case("too long, not cut", "POST", "/api/chat", {**native[1][1], "truncate": False, "messages": [
        {"role": "user", "content": "z" * 4500}]}))
    for target, body in (
            ("/api/embed", {"model": "tiny", "input": ["door", "wall"]}), ("/api/embeddings", {"model": "tiny", "prompt": "door"}),
            ("/api/embed", {"model": "tiny", "input": ["door"] * 300}),
            ("/api/embed", {"model": "tiny", "input": "z" * 4500, "truncate": False}), ("/api/embed", {"model": "nothing", "input": "x"}),
            ("/v1/embeddings", {"model": "tiny", "input": ["door", "wall"]}),
            ("/v1/embeddings", {"model": "tiny", "input": "door", "encoding_format": "base64"}), ("/v1/embeddings", {"model": "tiny"}),
            ("/api/show", {"model": "tiny"}), ("/api/show", {"model": "nothing"}), ("/api/show", {"model": "tiny", "verbose": True}),
            ("/api/copy", {"source": "tiny", "destination": "copied"}), ("/api/copy", {"source": "nothing", "destination": "x"}),
            ("/api/create", {"model": "made", "from": "tiny", "stream": False}), ("/api/create", {"model": "made", "from": "tiny"}),
            ("/api/create", {}), ("/api/pull", {}), ("/api/push", {}),
            ("/api/me", {}), ("/api/signout", {}), ("/v1/images/generations", {"model": "tiny"}),
            ("/v1/images/edits", {"model": "tiny", "prompt": "x"}), ("/api/experimental/aliases", {})):
        cases.append(Case(f"POST {target} {json.dumps(body)[:60]}", "POST", target, body))
    for target in ("/", "/api/version", "/api/status", "/api/tags", "/api/ps", "/v1/models", "/v1/models/tiny",
                   "/v1/models/nothing", "/v1/models/", "/api/tags/", "/api/experimental/aliases", "/no-such-route",
                   "/api/no-such-route", "/v1/no-such-route", "/api/show", "/debug/pprof", "/v1/models/org%2Fname",
                   "/api/blobs/sha256:" + "0" * 64, "//api/tags"):
        cases.append(Case(f"GET {target}", "GET", target))
        cases.append(Case(f"HEAD {target}", "HEAD", target))
    cases += [Case(f"{method} /api/tags", method, "/api/tags") for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "POST")]
    cases.append(Case("DELETE /api/delete nothing", "DELETE", "/api/delete", {"model": "nothing"}))
    cases.append(Case("DELETE /api/delete no body", "DELETE", "/api/delete"))
    cases.append(Case("DELETE /api/user/keys/x", "DELETE", "/api/user/keys/x"))
    cases.append(Case("DELETE aliases", "DELETE", "/api/experimental/aliases", {"alias": "x"}))
    cases.append(Case("bad digest", "POST", "/api/blobs/sha256:" + "1" * 64, b"x"))
    cases += sized("/api/generate", "long prompt", lambda size: json.dumps(
        {"model": "no-such-model", "prompt": "door " * (size // 5), "stream": False}).encode())
    cases += sized("/v1/no-such-route", "unknown route", lambda size: b"x" * size)
    cases += sized("/api/blobs/sha256:" + "2" * 64, "blob", lambda size: b"x" * size)
    return cases


# (server, pattern of the case's name, pattern of what differs, why)
UNLIKE = [
    ("llama", "(GET|HEAD) /health", "fields|shape", "/health is tinyauth's own answer: it lives, whatever its model server does"),
]


def covers(entry, kind, case, what):
    return entry[0] == kind and bool(re.fullmatch(entry[1], case.name) and re.fullmatch(entry[2], what))
