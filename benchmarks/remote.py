"""Time that a step waits for its shard over a link of 50 ms, with and without prefetching.

    python benchmarks/remote.py                          about a minute
    python benchmarks/remote.py --latency 0.2 --megabytes 100

A server on the loopback, in a process of its own, answers each request after `--latency` and sends at most `--rate` on each
connection, whichever shard it is. A reader goes through the shards, one a step, and computes for `--step` in between.
"""

import argparse
import hashlib
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dnal_dist.data.cache import Cache
from dnal_dist.data.prefetch import Need, Prefetcher


def serve(body: bytes, latency: float, rate: float, port) -> None:
    """Every path is `body`. latency: seconds; rate: bytes a second of one connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            time.sleep(latency)
            begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            part = body[begin : end + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            started = time.perf_counter()
            for at in range(0, len(part), 1 << 18):
                self.wfile.write(part[at : at + (1 << 18)])
                time.sleep(max(0.0, (at + (1 << 18)) / rate - (time.perf_counter() - started)))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_port)
    server.serve_forever()


def waits(url: str, size: int, sha256: str, steps: int, step: float, prefetch_bytes: int) -> list[float]:
    """Seconds that each step waits for its shard; prefetch_bytes: limit of the prefetcher, 0 for none."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), 1 << 40)
        needs = [Need(n, f"{url}/{n}.tar", size, sha256) for n in range(steps)]
        prefetcher = Prefetcher(cache, lambda begin: iter(needs[begin:]), prefetch_bytes) if prefetch_bytes else None
        for need in needs:
            if prefetcher:
                prefetcher.at(need.position)
            started = time.perf_counter()
            os.close(cache.open(*need[1:]))
            found.append(time.perf_counter() - started)
            time.sleep(step)
        if prefetcher:
            prefetcher.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before an answer (%(default)s)")
    parser.add_argument("--rate", type=float, default=100, help="MB a second of one connection (%(default)s)")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 10, 40], help="sizes of shards (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="shards that are read (%(default)s)")
    parser.add_argument("--step", type=float, default=0.25, help="seconds that a step computes (%(default)s)")
    args = parser.parse_args()
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = "127.0.0.1"
    print(f"{args.steps} steps of {args.step} s, {1000 * args.latency:.0f} ms a request, {args.rate:.0f} MB/s a connection")
    print("| shard | prefetching | first step waits | later steps wait, mean | most |")
    print("|---|---|---|---|---|")
    for megabytes in args.megabytes:
        body = os.urandom(int(megabytes * 1e6))
        port = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(body, args.latency, args.rate * 1e6, port), daemon=True)
        server.start()
        one = f"http://127.0.0.1:{port.get()}", len(body), hashlib.sha256(body).hexdigest()
        for name, prefetch_bytes in (("no", 0), ("yes", 6 * len(body))):
            first, *later = waits(*one, args.steps, args.step, prefetch_bytes)
            figures = (first, statistics.mean(later), max(later))
            print(f"| {megabytes:g} MB | {name} | " + " | ".join(f"{1000 * value:.1f} ms" for value in figures) + " |", flush=True)
        server.terminate()


if __name__ == "__main__":
    main()
