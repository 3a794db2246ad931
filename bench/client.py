"""The client for large bodies, run as a process of its own on the clients' core.

Reads one job as JSON from standard input and writes the outcome as JSON. Bodies are read into one buffer and dropped,
so that all servers face the same cheap client. Jobs:
  together  every path at once, a connection each
  again     the same, again and again, until `seconds` have passed; the outcome is a list for each time
  sequence  one path after another on one connection
  probe     one path again and again, every 2 ms or so, until `seconds` have passed
"""

import itertools
import json
import selectors
import socket
import sys
import time

BUFFER = memoryview(bytearray(512 * 1024))


class Transfer:
    """One GET: what came, when, and whether it ended as it should."""

    def __init__(self, path):
        self.path, self.head, self.got, self.length = path, bytearray(), 0, None
        self.status = self.first = self.last = None
        self.tail = b""

    def take(self, data):
        """Bytes of the answer; true when that was all."""
        if self.status is None:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return False
            lines = bytes(self.head[:end]).decode("latin-1").split("\r\n")
            self.status = int(lines[0].split()[1])
            fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            self.length = int(fields["content-length"]) if "content-length" in fields else None
            data = memoryview(bytes(self.head[end + 4:]))
        if len(data):
            self.first = self.first or time.time()
            self.got += len(data)
            self.tail = (self.tail + bytes(data[-5:]))[-5:]
        return self.is_complete()

    def is_complete(self):
        if self.status is None:
            return False
        # Without a length the answer is chunked, and its last chunk is the end.
        return self.got >= self.length if self.length is not None else self.tail == b"0\r\n\r\n"

    def outcome(self, began):
        return {"status": self.status, "bytes": self.got, "first": self.first and self.first - began,
                "last": self.last and self.last - began,
                "ended_at": self.last, "complete": self.status in (200, 206) and self.is_complete()}


def request(port, path):
    # The port is part of the name that some caches keep things under; wrk and curl send it too.
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: bench\r\n\r\n".encode()


def together(port, paths, deadline):
    began = time.time()
    selector = selectors.DefaultSelector()
    transfers = [Transfer(path) for path in paths]
    for transfer in transfers:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.sendall(request(port, transfer.path))
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, transfer)
    while selector.get_map() and time.time() < deadline:
        for key, _ in selector.select(1):
            try:
                count = key.fileobj.recv_into(BUFFER)
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if count == 0 or key.data.take(BUFFER[:count]):
                key.data.last = time.time()
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return [transfer.outcome(began) for transfer in transfers]


def again(port, paths, deadline):
    outcomes = []
    while not outcomes or time.time() < deadline:
        outcomes.append(together(port, paths, time.time() + 300))
    return outcomes


def sequence(port, paths, deadline, pause=0.0):
    outcomes, connection = [], None
    for path in paths:
        if time.time() > deadline:
            break
        connection = connection or socket.create_connection(("127.0.0.1", port), timeout=120)
        began, transfer = time.time(), Transfer(path)
        try:
            connection.sendall(request(port, path))
            while count := connection.recv_into(BUFFER):
                if transfer.take(BUFFER[:count]):
                    break
        except OSError:
            pass
        transfer.last = time.time()
        outcomes.append(transfer.outcome(began))
        if not transfer.is_complete() or b"connection: close" in bytes(transfer.head).lower():
            connection.close()
            connection = None
        time.sleep(pause)
    return outcomes


def probe(port, paths, deadline):
    return sequence(port, itertools.cycle(paths), deadline, pause=0.002)


def main():
    job = json.load(sys.stdin)
    run = {"together": together, "again": again, "sequence": sequence, "probe": probe}[job["how"]]
    json.dump(run(job["port"], job["paths"], time.time() + job["seconds"]), sys.stdout)


if __name__ == "__main__":
    main()
