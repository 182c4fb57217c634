// node's https over one keep-alive agent: each job asks twice on one connection. Jobs come as JSON in argv, what came goes
// to stdout as JSON.
import fs from "node:fs";
import https from "node:https";

const { jobs, ca, key } = JSON.parse(process.argv[2]);

function ask(agent, job) {
  return new Promise((resolve, reject) => {
    const options = { agent, host: "127.0.0.1", servername: "localhost", port: job.port, path: "/t/echo",
      headers: { Authorization: `Bearer ${key}` } };
    const request = https.request(options, (response) => {
      let body = "";
      const { socket } = response;
      const cipher = socket.getCipher().standardName, protocol = socket.getProtocol(), alpn = socket.alpnProtocol;
      response.on("data", (piece) => { body += piece; });
      response.on("end", () => resolve({ status: response.statusCode, reused: request.reusedSocket, cipher, protocol, alpn,
        port: socket.localPort, target: JSON.parse(body).target }));
    });
    request.on("error", reject);
    request.end();
  });
}

const results = [];
for (const job of jobs) {
  const agent = new https.Agent({ keepAlive: true, maxSockets: 1, ca: fs.readFileSync(ca), ciphers: job.cipher,
    ...(job.alpn ? { ALPNProtocols: job.alpn } : {}) });
  try {
    results.push([await ask(agent, job), await ask(agent, job)]);
  } catch (error) {
    results.push(`${error.code}: ${error.message}`);
  }
  agent.destroy();
}
console.log(JSON.stringify(results));
