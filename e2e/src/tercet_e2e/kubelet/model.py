"""What the stand-in observes and what it may do: plain values, no I/O.

One pass of `decide` turns an `Observed` into actions. Each action has a key: at most one of a key
is under way at a time, and a key that failed waits before it is tried again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NewType

PodUid = NewType("PodUid", str)
VolumeHandle = NewType("VolumeHandle", str)

RestartPolicy = Literal["Always", "OnFailure", "Never"]


class Phase(enum.Enum):
    """How far a CSI call got, as far as is known."""

    NONE = "none"
    UNCERTAIN = "uncertain"  # called, or about to be: it may have happened
    DONE = "done"


class Run(enum.Enum):
    """What a container does."""

    NEVER = "never"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a pod."""

    name: str
    run: Run = Run.NEVER
    exit_code: int | None = None
    restarts: int = 0
    next_start_s: float = 0.0  # not before this, when it has exited

    def finished(self, policy: RestartPolicy) -> bool:
        """It has exited and is not to be started again."""
        if self.run is not Run.EXITED or policy == "Always":
            return False
        return policy == "Never" or self.exit_code == 0


@dataclass(frozen=True, slots=True)
class CsiUse:
    """A CSI volume in a pod."""

    volume: str  # its name in the pod
    handle: VolumeHandle | None  # None while the claim is not resolved
    attached: bool = False  # the attach-detach controller says so in the Node
    reported: bool = False  # the Node says that we use it
    published: Phase = Phase.NONE
    grow: bool = False  # the volume is larger than its claim says


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that is bound to this node, or was."""

    uid: PodUid
    name: str  # namespace/name
    present: bool = True  # the API server has it
    deleting: bool = False
    deadline_s: float | None = None  # when the grace of a deletion is over
    terminating: bool = False  # its containers got SIGTERM
    policy: RestartPolicy = "Always"
    prepared: bool = False  # folders and plain volumes are made
    csi: tuple[CsiUse, ...] = ()
    init: tuple[Container, ...] = ()
    main: tuple[Container, ...] = ()
    problem: str = ""  # why it can never run here
    failed: bool = False  # recorded as Failed or Succeeded by the API server already

    @property
    def containers(self) -> tuple[Container, ...]:
        """All, those that run before the others first."""
        return self.init + self.main

    @property
    def terminal(self) -> bool:
        """All its containers are through, or it can never run."""
        if self.failed or self.problem:
            return True
        init_policy: RestartPolicy = "Never" if self.policy == "Never" else "OnFailure"
        if any(c.finished(init_policy) and c.exit_code != 0 for c in self.init):
            return True
        return bool(self.main) and all(c.finished(self.policy) for c in self.main)

    @property
    def ending(self) -> bool:
        """It is to be wound down."""
        return self.deleting or not self.present or self.terminal


@dataclass(frozen=True, slots=True)
class Observed:
    """All that a decision rests on."""

    now_s: float
    pods: tuple[Pod, ...]
    staged: Mapping[VolumeHandle, Phase]
    busy: frozenset[str]  # keys with an action under way
    not_before_s: Mapping[str, float]  # keys that failed, and when to try again
    in_use: frozenset[VolumeHandle]  # what the Node says


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look up the claim of a volume."""

    pod: PodUid
    volume: str

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"resolve/{self.pod}/{self.volume}"


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make the pod's folders and its volumes that are no CSI volumes."""

    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"prepare/{self.pod}"


@dataclass(frozen=True, slots=True)
class Stage:
    """NodeStageVolume, for a pod that waits for it."""

    handle: VolumeHandle
    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"volume/{self.handle}"


@dataclass(frozen=True, slots=True)
class Unstage:
    """NodeUnstageVolume."""

    handle: VolumeHandle

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"volume/{self.handle}"


@dataclass(frozen=True, slots=True)
class Publish:
    """NodePublishVolume."""

    handle: VolumeHandle
    pod: PodUid
    volume: str

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"volume/{self.handle}"


@dataclass(frozen=True, slots=True)
class Unpublish:
    """NodeUnpublishVolume."""

    handle: VolumeHandle
    pod: PodUid
    volume: str

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"volume/{self.handle}"


@dataclass(frozen=True, slots=True)
class Expand:
    """NodeExpandVolume, and tell the claim."""

    handle: VolumeHandle
    pod: PodUid
    volume: str

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"volume/{self.handle}"


@dataclass(frozen=True, slots=True)
class Start:
    """Start a container, for the first time or again."""

    pod: PodUid
    container: str

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"container/{self.pod}/{self.container}"


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM to all containers of a pod; its grace begins."""

    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"end/{self.pod}"


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to all containers of a pod."""

    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"end/{self.pod}"


@dataclass(frozen=True, slots=True)
class Finish:
    """Take a pod that is wound down out of the API server."""

    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"end/{self.pod}"


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove what is left on disk of a pod that the API server does not have."""

    pod: PodUid

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return f"end/{self.pod}"


@dataclass(frozen=True, slots=True)
class ReportInUse:
    """Write `volumesInUse` into the Node."""

    handles: frozenset[VolumeHandle]

    @property
    def key(self) -> str:
        """What is done one at a time."""
        return "node/volumes-in-use"


VolumeAction = Stage | Unstage | Publish | Unpublish | Expand
Action = VolumeAction | Resolve | Prepare | Start | Terminate | Kill | Finish | Forget | ReportInUse


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and when to look again at the latest."""

    actions: tuple[Action, ...]
    wake_s: float | None
