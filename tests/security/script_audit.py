"""Imports everything that needs no torch, replays and records, and prints each forbidden thing that it did."""

import io
import sys

FORBIDDEN = (
    "ftplib.",
    "http.",
    "imaplib.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pickle.",
    "poplib.",
    "pty.",
    "shelve.",
    "smtplib.",
    "socket.",
    "subprocess.",
    "telnetlib.",
    "urllib.",
    "webbrowser.",
)
seen = []


def watch(event, arguments):
    is_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if is_write or event.startswith(FORBIDDEN):
        seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(watch)

from pagedkv import CacheConfig, KVCacheManager  # noqa: E402
from pagedkv.scheduler import EventLog, Recorder, Request, Scheduler, SchedulerConfig, replay_recording  # noqa: E402
from pagedkv.simulations import cli  # noqa: E402, F401
from pagedkv.simulations.replay import ReplayConfig, replay  # noqa: E402
from pagedkv.simulations.traces import sample_trace  # noqa: E402

replay(sample_trace().head(50), ReplayConfig(), sink=EventLog(io.StringIO()))
recording = io.StringIO()
recorder = Recorder(Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(8))), recording)
recorder.add(Request("a", [1, 2, 3], 2), 0.0)
while recorder.has_work:
    recorder.update(recorder.schedule(0.0), [1], 0.0)
list(replay_recording(recording.getvalue().splitlines()))
print("\n".join(seen))
