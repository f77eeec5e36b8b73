"""Who runs in the next step, with how many tokens: admission, chunked prefill, preemption. No clock, no tensors."""

from pagedkv.scheduler.bounds import steps_to_serve
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.drafts import DraftCounters
from pagedkv.scheduler.events import (
    Aborted,
    Added,
    Admitted,
    Deferred,
    Event,
    EventLog,
    EventSink,
    Finished,
    Preempted,
    Refused,
    StepFailed,
)
from pagedkv.scheduler.order import FCFS, LatestArrival, LowestPriority, Priority, QueuePolicy, VictimPolicy
from pagedkv.scheduler.outcome import StepOutcome
from pagedkv.scheduler.plan import PlanDrafts, Seat, StepPlan
from pagedkv.scheduler.preemption import Cheaper, PreemptionMode, PreemptionPolicy, Recompute, Swap
from pagedkv.scheduler.recording import Recorder, RecordingError
from pagedkv.scheduler.refusal import QueueFullError, RequestTooLargeError
from pagedkv.scheduler.replay import replay_recording
from pagedkv.scheduler.request import FinishReason, Request
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.scheduler import Scheduler
from pagedkv.scheduler.step_events import Output, StepEvents

__all__ = [
    "FCFS",
    "Cheaper",
    "DraftCounters",
    "Event",
    "EventLog",
    "EventSink",
    "FinishReason",
    "LatestArrival",
    "LowestPriority",
    "Output",
    "PlanDrafts",
    "PreemptionMode",
    "PreemptionPolicy",
    "Priority",
    "QueueFullError",
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
    "StepOutcome",
    "StepPlan",
    "Swap",
    "VictimPolicy",
    "replay_recording",
    "steps_to_serve",
    "Aborted",
    "Added",
    "Admitted",
    "Deferred",
    "Finished",
    "Preempted",
    "Refused",
    "StepFailed",
    "Sample",
    "SampleState",
]
