// The Ollama client for JavaScript: it sends only the headers it is given, and has no retries.
import assert from 'node:assert/strict';
import { Ollama } from 'ollama';
import { arrivals, ENDLESS, KEY, sameSpacing, SPACED, within, WRONG_KEY } from './harness.mjs';

const chat = { model: 'stand-in', messages: [{ role: 'user', content: 'hello' }] };

function client(host, key = KEY, headers = SPACED) {
  return new Ollama({ host, headers: { Authorization: `Bearer ${key}`, ...headers } });
}

async function collect(stream, text) {
  let whole = '';
  let last;
  for await (const part of stream) {
    whole += text(part);
    last = part;
  }
  return { whole, last };
}

async function ourMessage(url) {
  const headers = { Authorization: `Bearer ${WRONG_KEY}` };
  const answer = await fetch(`${url}/api/chat`, { method: 'POST', headers, body: JSON.stringify(chat) });
  return (await answer.json()).error;
}

export async function ollamaTests({ test, url, straight, down, relay }) {
  await test('ollama: a streamed chat is whole and equals the one straight from the model', async () => {
    const read = async (base) => collect(await client(base).chat({ ...chat, stream: true }), (part) => part.message.content);
    const { whole, last } = await read(url);
    assert.ok(whole.length > 0);
    assert.equal(last.done, true);
    assert.equal(whole, (await read(straight)).whole);
  });

  await test('ollama: each line of a stream arrives as its own', async () => {
    const times = async (base) => arrivals(await client(base).chat({ ...chat, stream: true }));
    await sameSpacing(times, url, straight);
  });

  await test('ollama: a plain chat is answered', async () => {
    const answer = await client(url).chat(chat);
    assert.ok(answer.message.content.length > 0);
    assert.equal(answer.done, true);
  });

  await test('ollama: generate is answered, streamed and plain', async () => {
    const request = { model: 'stand-in', prompt: 'hello' };
    const { whole, last } = await collect(await client(url).generate({ ...request, stream: true }), (part) => part.response);
    assert.ok(whole.length > 0 && last.done);
    assert.ok((await client(url).generate(request)).response.length > 0);
  });

  await test('ollama: models are listed', async () => {
    assert.ok((await client(url).list()).models.length > 0);
  });

  await test('ollama: the error text for a wrong key is our message, a string', async () => {
    const message = await ourMessage(url);
    assert.equal(typeof message, 'string');
    const before = relay.requests();
    for (const call of [() => client(url, WRONG_KEY).chat(chat), () => client(url, WRONG_KEY).list()]) {
      const error = await call().catch((reason) => reason);
      assert.equal(error.status_code, 401);
      assert.equal(error.error, message);
    }
    assert.equal(relay.requests(), before);
  });

  await test('ollama: an upstream that is down is told in words', async () => {
    const error = await client(down).chat(chat).catch((reason) => reason);
    assert.equal(error.status_code, 502);
    assert.match(error.error, /127\.0\.0\.1:\d+/);
  });

  await test('ollama: abort closes the upstream connection at once', async () => {
    const ollama = client(url, KEY, ENDLESS);
    let parts = 0;
    let connection;
    const reading = (async () => {
      for await (const _ of await ollama.chat({ ...chat, stream: true })) {
        if (++parts === 3) {
          connection = relay.latest();
          ollama.abort();
        }
      }
    })();
    await assert.rejects(reading, { name: 'AbortError' });
    await within(500, 'upstream connection closed', connection.closed);
  });
}
