"""Prints the digest of an event log and of all plans: prompts with tokens and simulated ones, swaps, aborts, failures."""

import io
from hashlib import sha256

from pagedkv import CacheConfig, ExtraKey, KVCacheManager, SimulatedPrompt
from pagedkv.eviction import POLICY_NAMES, make_policy
from pagedkv.scheduler import Cheaper, EventLog, LowestPriority, Priority, Recorder, Request, Scheduler, SchedulerConfig


def serve(eviction, log, recording):
    """A crowd on few blocks; every call and every plan goes into the recording, every event into the log."""
    manager = KVCacheManager(CacheConfig(20, 4, 12), eviction=make_policy(eviction, 20))
    scheduler = Recorder(
        Scheduler(
            SchedulerConfig(24, 6, watermark=0),
            manager,
            policy=Priority(0.5),
            victim=LowestPriority(),
            preemption=Cheaper(1.0, 1.5),
            sink=EventLog(log),
        ),
        recording,
    )
    state = 1
    for step in range(120):
        state = state * 6364136223846793005 % 2**64 + 1442695040888963407
        draw = state >> 33
        if step < 60:
            length, salt = 2 + draw % 17, (b"", b"s", bytes(3))[draw % 3]
            prompt = [(draw >> 4) % 2 + i // 5 for i in range(length)]
            if draw % 5 == 0:
                request = Request(f"r{step}", SimulatedPrompt(length, list(range(-(-length // 4))), 4), 9)
            else:
                extras = (ExtraKey(0, 2, b"i"),) if draw % 7 == 0 else ()
                request = Request(
                    f"r{step}",
                    prompt,
                    1 + draw % 13,
                    priority=float(draw % 4),
                    salt=salt,
                    extras=extras,
                    n=1 + draw % 2,
                )
            scheduler.add(request, float(step))
        plan = scheduler.schedule(float(step))
        if step % 11 == 10:
            scheduler.fail(plan, step + 0.25, "lost")
        else:
            scheduler.update(plan, [step % 9] * len(plan.sampling_rows), step + 0.5)
        if step % 13 == 12 and f"r{step - 2}" in scheduler.scheduler._live:
            scheduler.abort(f"r{step - 2}", step + 0.75)
        scheduler.scheduler.check_invariants()


log, recording = io.StringIO(), io.StringIO()
for name in POLICY_NAMES:
    serve(name, log, recording)
kinds = ("added", "admitted", "deferred", "preempted", "finished", "aborted", "stepfailed")
missing = [kind for kind in kinds if f'"event":"{kind}"' not in log.getvalue()]
if missing or '"mode":"swapped in"' not in log.getvalue():
    raise SystemExit(f"the scenario shows no {missing}")
print(sha256(log.getvalue().encode()).hexdigest(), sha256(recording.getvalue().encode()).hexdigest())
