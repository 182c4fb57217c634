#!/usr/bin/env python3
"""Writes a language model of random weights, as a GGUF file that llama-server and Ollama load.

    gguf.py FILE [--slow]

It answers any prompt with words that mean nothing, and never ends by itself: a caller gets as many tokens as were asked
for. So the real server shows its real routes, fields and streams, and nothing is fetched. --slow makes the model wide
enough that a token takes some milliseconds, so that a stream lasts.
"""

import argparse
import array
import random
import struct

WORDS = ["▁the", "▁key", "▁opens", "▁a", "▁door", "▁model", "▁speaks", "▁.", "▁and", "▁wall", "▁user", "▁assistant"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
ALIGNMENT = 32
CONTEXT = 2048
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6     # kinds of tokens


def vocabulary():
    """(text, score, kind) of a SentencePiece vocabulary: three controls, the 256 bytes, a few words."""
    return ([("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
            + [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
            + [(word, -i, NORMAL) for i, word in enumerate(WORDS)])


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value_of(value):
    """A value with its type before it: 4 uint32, 5 int32, 6 float32, 8 string, 9 array."""
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind, pack = {int: (5, lambda v: struct.pack("<i", v)), float: (6, lambda v: struct.pack("<f", v)), str: (8, text)}[type(value[0])]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(pack, value))


class Weights:
    """Matrices of normally distributed numbers, drawn by 16-bit index from a table of some thousand."""

    def __init__(self, width):
        self.random = random.Random(1)
        self.table = [self.random.gauss(0, 0.5 / width ** 0.5) for _ in range(1 << 16)]

    def matrix(self, rows, columns):
        draws = array.array("H", self.random.randbytes(2 * rows * columns))
        return array.array("f", map(self.table.__getitem__, draws))


def tensors(width, layers, tokens):
    """(name, rows, columns, numbers). The first number of each token's state is large and no layer adds to it; only the score of
    the end token depends on it, and falls: so an answer never ends before its limit."""
    weights, hidden = Weights(width), 2 * width
    embeddings = weights.matrix(len(tokens), width)
    for row in range(len(tokens)):
        embeddings[row * width] = 2.0
    yield "token_embd.weight", len(tokens), width, embeddings
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{block}{norm}.weight", 1, width, array.array("f", [1.0] * width)
        for part in ("attn_q", "attn_k", "attn_v"):
            yield f"{block}{part}.weight", width, width, weights.matrix(width, width)
        for part, inputs in (("attn_output", width), ("ffn_down", hidden)):
            matrix = weights.matrix(width, inputs)
            matrix[:inputs] = array.array("f", bytes(4 * inputs))
            yield f"{block}{part}.weight", width, inputs, matrix
        for part in ("ffn_gate", "ffn_up"):
            yield f"{block}{part}.weight", hidden, width, weights.matrix(hidden, width)
    yield "output_norm.weight", 1, width, array.array("f", [1.0] * width)
    head = weights.matrix(len(tokens), width)
    for row in range(len(tokens)):
        head[row * width] = 0.0
    head[tokens.index("</s>") * width] = -20.0
    yield "output.weight", len(tokens), width, head


def write(path, slow):
    width, layers, heads = (512, 8, 8) if slow else (32, 2, 4)
    entries = vocabulary()
    tokens = [entry[0] for entry in entries]
    about = {
        "general.architecture": "llama",
        "general.name": "slow" if slow else "tiny",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": width,
        "llama.block_count": layers,
        "llama.feed_forward_length": 2 * width,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": width // heads,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(entry[1]) for entry in entries],
        "tokenizer.ggml.token_type": [entry[2] for entry in entries],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    infos, data, count = bytearray(), bytearray(), 0
    for name, rows, columns, numbers in tensors(width, layers, tokens):
        shape = [columns] if rows == 1 else [columns, rows]
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += numbers.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
        count += 1
    head = struct.pack("<4sIQQ", b"GGUF", 3, count, len(about))
    head += b"".join(text(key) + value_of(value) for key, value in about.items()) + infos
    with open(path, "wb") as out:
        out.write(head + bytes(-len(head) % ALIGNMENT) + data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    write(options.file, options.slow)
