"""Makes every mistake that an engine or its users can make, and prints each one's verdict, as JSON lines."""

import io
import json

import numpy as np

from pagedkv import BlockPool, CacheConfig, CacheIdentity, ExtraKey, KVCacheManager, KVSpec, SimulatedPrompt
from pagedkv.eviction import make_policy
from pagedkv.scheduler import Recorder, Request, Scheduler, SchedulerConfig, StepOutcome, replay_recording

manager = KVCacheManager(CacheConfig(8, 2, 2))
manager.open("a", [1, 2, 3])
manager.append("a", 3)
manager.open("out", [9, 9])
manager.append("out", 2)
manager.swap_out("out")
used = manager.lookup([1, 2, 3])
used.drop()
other = KVCacheManager(CacheConfig(8, 2)).lookup([1])
pool = BlockPool(4)
held = pool.allocate(2)
free = pool.allocate(1)
pool.release(free)
scheduler = Scheduler(SchedulerConfig(16, 4), KVCacheManager(CacheConfig(8, 2)))
scheduler.add(Request("live", [1, 2, 3], 4), 0.0)
stale = scheduler.schedule(0.0)
scheduler.update(stale, [7], 1.0)
plan = scheduler.schedule(1.0)

ids = lambda *values: np.array(values, np.int64)  # noqa: E731
MISTAKES = {
    "open twice": lambda: manager.open("a", [1]),
    "open nothing": lambda: manager.open("b", []),
    "open negative": lambda: manager.open("b", [-1]),
    "open floats": lambda: manager.open("b", [1.5]),
    "open text": lambda: manager.open("b", "abc"),
    "open none": lambda: manager.open("b", None),
    "open nested": lambda: manager.open("b", [[1], [2, 3]]),
    "open 2^70": lambda: manager.open("b", [2**70]),
    "open unhashable": lambda: manager.open([], [1]),
    "open used hit": lambda: manager.open("b", used),
    "open foreign hit": lambda: manager.open("b", other),
    "open salted hit": lambda: manager.open("b", other, salt=b"x"),
    "open wrong salt": lambda: manager.open("b", [1], salt="x"),
    "open long salt": lambda: manager.open("b", [1], salt=bytes(65)),
    "open wrong extras": lambda: manager.open("b", [1], extras=[(0, 1)]),
    "open salted simulation": lambda: manager.open("b", SimulatedPrompt(3), salt=b"x"),
    "close unknown": lambda: manager.close("nobody"),
    "close unhashable": lambda: manager.close([]),
    "append unknown": lambda: manager.append("nobody", 1),
    "append beyond": lambda: manager.append("a", 1),
    "append negative": lambda: manager.append("a", -1),
    "append to swapped": lambda: manager.append("out", 0),
    "extend unknown": lambda: manager.extend("nobody", [1]),
    "extend by number": lambda: manager.extend("a", 1),
    "fork unknown": lambda: manager.fork("nobody", "b"),
    "fork onto live": lambda: manager.fork("a", "a"),
    "fork unhashable": lambda: manager.fork("a", {}),
    "truncate beyond": lambda: manager.truncate("a", 99),
    "truncate to nothing": lambda: manager.truncate("a", 0),
    "swap out twice": lambda: manager.swap_out("out"),
    "swap out too much": lambda: manager.swap_out("a"),
    "swap in resident": lambda: manager.swap_in("a"),
    "drop twice": used.drop,
    "release free": lambda: pool.release(free),
    "release twice at once": lambda: pool.release(ids(0, 0)),
    "release unknown": lambda: pool.release(ids(4)),
    "release negative": lambda: pool.release(ids(-1)),
    "release floats": lambda: pool.release(np.array([0.0])),
    "release a list": lambda: pool.release([0]),
    "acquire free": lambda: pool.acquire(free),
    "allocate negative": lambda: pool.allocate(-1),
    "allocate true": lambda: pool.allocate(True),
    "allocate too many": lambda: pool.allocate(99),
    "config of nothing": lambda: CacheConfig(0),
    "config of text": lambda: CacheConfig("8"),
    "config identity": lambda: CacheConfig(8, identity="llama"),
    "spec of a dtype": lambda: KVSpec(1, 1, 1, dtype="int3"),
    "identity of bytes": lambda: CacheIdentity(b"m"),
    "item backwards": lambda: ExtraKey(3, 2, b"x"),
    "policy unknown": lambda: make_policy("mru", 4),
    "policy unhashable": lambda: make_policy([], 4),
    "policy of another size": lambda: KVCacheManager(CacheConfig(8), eviction=make_policy("lru", 4)),
    "add twice": lambda: scheduler.add(Request("live", [1], 1), 1.0),
    "add what never fits": lambda: scheduler.add(Request("huge", [1] * 99, 1), 1.0),
    "add at no time": lambda: scheduler.add(Request("b", [1], 1), float("nan")),
    "add at a vast time": lambda: scheduler.add(Request("b", [1], 1), 10**400),
    "add at a text": lambda: scheduler.add(Request("b", [1], 1), "now"),
    "abort unknown": lambda: scheduler.abort("nobody", 1.0),
    "abort unhashable": lambda: scheduler.abort([], 1.0),
    "schedule twice": lambda: scheduler.schedule(1.0),
    "update stale": lambda: scheduler.update(stale, [7], 1.0),
    "update with nothing": lambda: scheduler.update(plan, None, 1.0),
    "update with too many": lambda: scheduler.update(plan, [7, 7], 1.0),
    "update with negative": lambda: scheduler.update(plan, [-7], 1.0),
    "update with text": lambda: scheduler.update(plan, "ab", 1.0),
    "update with wrong counts": lambda: scheduler.update(plan, StepOutcome([7], [5]), 1.0),
    "update with wrong flags": lambda: scheduler.update(plan, StepOutcome([7], None, [1]), 1.0),
    "update with no plan": lambda: scheduler.update(None, [7], 1.0),
    "fail stale": lambda: scheduler.fail(stale, 1.0),
    "fail with no plan": lambda: scheduler.fail(None, 1.0),
    "read stale": lambda: stale.token_ids,
    "leap in flight": lambda: scheduler.leap(1, 2.0),
    "request of no id": lambda: Request("", [1], 1),
    "request of a number": lambda: Request(7, [1], 1),
    "request of half a token": lambda: Request("b", [1], 0.5),
    "request of a stop": lambda: Request("b", [1], 1, stop_token_ids=3),
    "record a policy of ours": lambda: Recorder(Scheduler(SchedulerConfig(), manager, policy=object()), io.StringIO()),
    "replay nothing": lambda: list(replay_recording([])),
}

for name, make in MISTAKES.items():
    try:
        made = make()
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        kinds = [kind.__name__ for kind in type(error).__mro__]
        print(json.dumps([name, kinds[0], "PagedKVError" in kinds, str(error)]))
    else:
        print(json.dumps([name, "nothing", False, repr(type(made))]))
manager.check_invariants()
pool.check_invariants()
scheduler.check_invariants()
scheduler.update(plan, [7], 2.0)
print(json.dumps(["after all", scheduler.num_running, len(manager), pool.num_free]))
