"""Small overloaded services under every fault; then the faults stop, and everybody must get through in time (F8).

`overload` is what comes, `trial` serves it and checks, `run` goes through seeds and shrinks what fails.
"""

from pagedkv.testing.liveness.overload import Overload, draw_overload
from pagedkv.testing.liveness.run import LivenessFailedError, LivenessReport, run_liveness
from pagedkv.testing.liveness.trial import LivenessTrial

__all__ = [
    "LivenessFailedError",
    "LivenessReport",
    "LivenessTrial",
    "Overload",
    "draw_overload",
    "run_liveness",
]
