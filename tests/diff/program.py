"""tinyauth as a process."""

import asyncio
import re
import signal

import grammar


class Tinyauth:
    """The program under test, with its log."""

    def __init__(self, binary, folder, upstream_port, *options):
        self.command = [binary, "-k", str(folder / "keys"), "-l", "127.0.0.1:0", "-u", f"127.0.0.1:{upstream_port}", "-w", "2",
                        "--ip-rate", "off", *options]
        self.log = folder / f"log-{upstream_port}"
        (folder / "keys").write_text(f"diff {grammar.KEY.decode()}\n")
        (folder / "keys").chmod(0o600)

    async def start(self):
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(*self.command, stderr=log, stdin=asyncio.subprocess.DEVNULL)
        for _ in range(500):
            text = self.log.read_text("latin-1")
            if "event=ready" in text:
                return int(re.search(r"event=listening addr=127\.0\.0\.1:(\d+)", text)[1])
            if self.process.returncode is not None:
                break
            await asyncio.sleep(0.02)
        raise RuntimeError(f"tinyauth did not get ready: {text}")

    async def stop(self):
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.returncode is None:
                self.process.send_signal(sent)
            try:
                await asyncio.wait_for(self.process.wait(), 1)
            except asyncio.TimeoutError:
                pass

    def deaths(self):
        lines = self.log.read_text("latin-1").splitlines()
        return [line for line in lines if "event=worker_died" in line or not re.match(r"time=\S+ (event|addr)=", line)]
