"""A TLS client socket whose every record a test can see and shape, and certificates for the tests (openssl makes them).

The socket keeps the bytes of both sides apart from the descriptor: it may be read and written by two threads at once, one
write is one record, a record may be sent in parts, and the end can be said by close_notify, by FIN alone or by a reset.
"""

import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

RECORD = 16384                          # plain bytes of a record at most
HANDSHAKE, ALERT, DATA = 22, 21, 23


class Ragged(ssl.SSLError):
    """The connection ended without close_notify."""


def client_context(cafile=None, **more):
    """TLS 1.2 without tickets, which the server does not know; without `cafile` any certificate will do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_TICKET
    if cafile:
        context.load_verify_locations(cafile)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if "ciphers" in more:
        context.set_ciphers(more["ciphers"])
    if "alpn" in more:
        context.set_alpn_protocols(more["alpn"])
    context.minimum_version = context.maximum_version = more.get("version", ssl.TLSVersion.TLSv1_2)
    return context


class SecureSocket:
    """What tests use of a socket, over TLS."""

    def __init__(self, raw, context=None, name=None, session=None):
        self.raw = raw
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or client_context()).wrap_bio(self.incoming, self.outgoing, server_hostname=name, session=session)
        self.lock, self.sending = threading.Lock(), threading.Lock()
        self.plain = bytearray()        # decrypted, not asked for yet
        self.waiting = b""              # encrypted, not sent yet
        self.tail = b""                 # the record that is not whole yet
        self.records = []               # (type, length) of each whole one that came
        self.handshake()

    def handshake(self):
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.flush()
                self.pull()
            except ssl.SSLError:
                self.flush()
                raise
        self.flush()

    # bytes of the wire

    def pull(self):
        """Reads the descriptor once; false at its end."""
        data = self.raw.recv(1 << 18)
        with self.lock:
            if data:
                self.note(data)
                self.incoming.write(data)
            else:
                self.incoming.write_eof()
        return bool(data)

    def note(self, data):
        self.tail += data
        while len(self.tail) >= 5 and len(self.tail) >= 5 + (length := struct.unpack_from("!H", self.tail, 3)[0]):
            self.records.append((self.tail[0], length))
            self.tail = self.tail[5 + length:]

    def encrypt(self, data):
        """Records that hold these bytes, 16 KB each, not sent."""
        with self.lock:
            for at in range(0, len(data), RECORD):
                self.tls.write(data[at:at + RECORD])
            return self.outgoing.read()

    def flush(self):
        """Sends what the TLS side has to say by itself."""
        with self.lock:
            data = self.outgoing.read()
        if data:
            with self.sending:
                self.raw.sendall(data)

    # what a socket does

    def sendall(self, data):
        with self.sending:
            self.raw.sendall(self.encrypt(bytes(data)))

    def send(self, data):
        """At most one record, taken whole; what the descriptor does not take at once goes before the next one."""
        with self.sending:
            self.push()
            piece = bytes(data[:RECORD])
            self.waiting = self.encrypt(piece)
            try:
                self.push()
            except (BlockingIOError, TimeoutError):
                pass
            return len(piece)

    def push(self):
        while self.waiting:
            self.waiting = self.waiting[self.raw.send(self.waiting):]

    def decrypt(self):
        """Takes what is decrypted already; false: the other side has said close_notify."""
        while True:
            try:
                with self.lock:
                    data = self.tls.read(RECORD)
            except ssl.SSLWantReadError:
                return True
            except ssl.SSLZeroReturnError:
                return False
            except ssl.SSLEOFError:
                raise Ragged("no close_notify") from None
            if not data:
                return False
            self.plain += data

    def recv(self, size):
        while not self.plain:
            going = self.decrypt()
            if self.plain:
                break
            if not going:
                return b""
            self.pull()
        data = bytes(self.plain[:size])
        del self.plain[:size]
        return data

    def recv_into(self, space):
        data = self.recv(len(space))
        space[:len(data)] = data
        return len(data)

    def say_goodbye(self):
        """Makes and sends close_notify. OpenSSL looks for the other side's at once: where data were on their way, nothing can
        be read any more."""
        with self.lock:
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                pass
        self.flush()

    def shutdown(self, how):
        if how != socket.SHUT_RD:
            self.say_goodbye()
        self.raw.shutdown(how)

    def close(self):
        """As programs do that behave: close_notify, then the end."""
        if self.raw.fileno() >= 0:
            try:
                self.raw.setblocking(False)
                self.say_goodbye()
            except (OSError, ValueError):
                pass
        self.raw.close()

    def fail(self):
        """Makes the TLS side find a broken record, and sends the fatal alert with which it answers."""
        with self.lock:
            self.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
            try:
                self.tls.read(1)
            except ssl.SSLError:
                pass
        self.flush()

    def reset(self):
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.raw.close()

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# Certificates

def openssl(*args, status=0, **more):
    done = subprocess.run(["openssl", *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, **more)
    assert status is None or done.returncode == status, f"openssl {args}: {done.stderr.decode()}"
    return done


KEYS = {"p256": ("EC", "ec_paramgen_curve:P-256"), "p384": ("EC", "ec_paramgen_curve:P-384"),
        "p521": ("EC", "ec_paramgen_curve:P-521"), "secp256k1": ("EC", "ec_paramgen_curve:secp256k1"),
        "rsa1024": ("RSA", "rsa_keygen_bits:1024"), "rsa2048": ("RSA", "rsa_keygen_bits:2048"),
        "rsa3072": ("RSA", "rsa_keygen_bits:3072"), "rsa4096": ("RSA", "rsa_keygen_bits:4096"),
        "rsa8192": ("RSA", "rsa_keygen_bits:8192"), "ed25519": ("ED25519", None)}

CA_CONFIG = """\
[ca]
default_ca = a
[a]
new_certs_dir = .
database = index
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
copy_extensions = copy
[any]
commonName = supplied
organizationName = optional
"""


class Pair:
    """A certificate chain and its key, as paths."""

    def __init__(self, cert, key):
        self.cert, self.key = str(cert), str(key)

    @property
    def options(self):
        return ("--tls-cert", self.cert, "--tls-key", self.key)


class Authority:
    """Makes keys and certificates in a folder of its own; a root, one intermediate below it, and leaves of either."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir()
        self.lock = threading.RLock()
        self.made = {}
        self.count = 0

    def path(self, name):
        return self.folder / name

    def once(self, what, make):
        with self.lock:
            if what not in self.made:
                self.made[what] = make()
            return self.made[what]

    def fresh_name(self):
        with self.lock:
            self.count += 1
            return f"n{self.count}"

    def make_key(self, kind):
        """A fresh key, PKCS#8."""
        algorithm, option = KEYS[kind]
        path = self.path(self.fresh_name() + ".key")
        openssl("genpkey", "-algorithm", algorithm, *(["-pkeyopt", option] if option else []), "-out", path)
        return path

    def key(self, kind):
        """The one key of this kind that tests share."""
        return self.once(("key", kind), lambda: self.make_key(kind))

    def make_authority(self, name, issuer=None):
        key, cert = self.key("p256") if not issuer else self.make_key("p256"), self.path(name + ".crt")
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
        if not issuer:
            openssl("req", "-x509", "-new", "-key", key, "-out", cert, "-days", "99", "-subj", f"/CN=tinyauth test {name}", *extensions)
        else:
            openssl("req", "-new", "-key", key, "-out", cert.with_suffix(".csr"), "-subj", f"/CN=tinyauth test {name}", *extensions)
            openssl("x509", "-req", "-in", cert.with_suffix(".csr"), "-CA", issuer.cert, "-CAkey", issuer.key, "-out", cert,
                    "-days", "98", "-copy_extensions", "copy")
        return Pair(cert, key)

    @property
    def root(self):
        return self.once("root", lambda: self.make_authority("root"))

    @property
    def intermediate(self):
        return self.once("intermediate", lambda: self.make_authority("intermediate", self.root))

    def leaf(self, kind="p256", key=None, issuer=None, days=90, subject="/CN=localhost/O=tinyauth tests",
             names="DNS:localhost,DNS:models.test,IP:127.0.0.1,IP:::1"):
        """A fresh certificate for a key; `days` may be negative or a pair of openssl's dates."""
        issuer, key = issuer or self.root, key or self.key(kind)
        name = self.fresh_name()
        request, cert = self.path(name + ".csr"), self.path(name + ".crt")
        openssl("req", "-new", "-key", key, "-out", request, "-subj", subject, "-addext", f"subjectAltName={names}")
        if isinstance(days, int) and days > 0:
            openssl("x509", "-req", "-in", request, "-CA", issuer.cert, "-CAkey", issuer.key, "-out", cert, "-days", days,
                    "-copy_extensions", "copy")
        else:
            self.sign_dated(name, issuer, days)
        return Pair(cert, key)

    def sign_dated(self, name, issuer, dates):
        """`openssl ca` takes any dates, such as past ones."""
        folder = self.path(name + ".ca")
        folder.mkdir()
        (folder / "index").touch()
        (folder / "config").write_text(CA_CONFIG, encoding="ascii")
        begin, end = ("20200101000000Z", "20210101000000Z") if isinstance(dates, int) else dates
        openssl("ca", "-batch", "-notext", "-config", "config", "-in", self.path(name + ".csr"), "-cert", issuer.cert,
                "-keyfile", issuer.key, "-startdate", begin, "-enddate", end, "-out", self.path(name + ".crt"), cwd=folder)

    def good(self, kind="p256"):
        """The pair of this kind that tests share, signed by the root."""
        return self.once(("good", kind), lambda: self.leaf(kind))

    def joined(self, *paths):
        """One file made of several."""
        path = self.path(self.fresh_name() + ".pem")
        path.write_bytes(b"".join(Path(part).read_bytes() for part in paths))
        return str(path)


def self_signed(folder):
    """A pair for the tests to which the certificate is all one."""
    cert, key = Path(folder) / "tls.crt", Path(folder) / "tls.key"
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert,
            "-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    return Pair(cert, key)
