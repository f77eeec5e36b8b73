"""Who runs in the next step, with how many tokens: admission, chunked prefill, preemption. No clock, no tensors."""

from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.events import Event, EventLog, EventSink
from pagedkv.scheduler.order import FCFS, LatestArrival, LowestPriority, Priority, QueuePolicy, VictimPolicy
from pagedkv.scheduler.plan import Output, Seat, StepEvents, StepPlan
from pagedkv.scheduler.preemption import Cheaper, PreemptionMode, PreemptionPolicy, Recompute, Swap
from pagedkv.scheduler.recording import Recorder, RecordingError, replay_recording
from pagedkv.scheduler.refusal import RequestTooLargeError
from pagedkv.scheduler.request import FinishReason, Request
from pagedkv.scheduler.scheduler import Scheduler

__all__ = [
    "FCFS",
    "Cheaper",
    "Event",
    "EventLog",
    "EventSink",
    "FinishReason",
    "LatestArrival",
    "LowestPriority",
    "Output",
    "PreemptionMode",
    "PreemptionPolicy",
    "Priority",
    "QueuePolicy",
    "Recompute",
    "Recorder",
    "RecordingError",
    "Request",
    "RequestTooLargeError",
    "Scheduler",
    "SchedulerConfig",
    "Seat",
    "StepEvents",
    "StepPlan",
    "Swap",
    "VictimPolicy",
    "replay_recording",
]
