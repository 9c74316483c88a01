"""The words of a program: one instruction, its operation, and its text form both ways.

    text     ::= stage op [microbatch] [">" peer | "<" peer]
    op       ::= compute | ("SEND_" | "RECV_") payload | "FREE_" kept
    compute  ::= "F" | "B" | "I" | "W" | "S" | "N" | "U"
    payload  ::= "F" | "B" | "G" | "N" | "P"
    kept     ::= "F" | "B" | "K"

`2F0` is stage 2, forward, microbatch 0; `2SEND_F0>3` sends what it made to stage 3, where
`3RECV_F0<2` receives it; `2FREE_F0` lets go of it. A program has for each stage and microbatch
either one `B` or the two halves of it, `I` (input gradients) and `W` (weight gradients). What each
operation reads, makes and frees stands in docs/schedules.md.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from launcher.errors import ScheduleError


class Op(StrEnum):
    """What an instruction does; the value is its text."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SYNCHRONIZE = "S"
    NORM = "N"
    UPDATE = "U"
    SEND_ACTIVATION = "SEND_F"
    RECEIVE_ACTIVATION = "RECV_F"
    SEND_COTANGENT = "SEND_B"
    RECEIVE_COTANGENT = "RECV_B"
    SEND_TIED_GRADIENT = "SEND_G"
    RECEIVE_TIED_GRADIENT = "RECV_G"
    SEND_NORM = "SEND_N"
    RECEIVE_NORM = "RECV_N"
    SEND_TIED_PARAMETER = "SEND_P"
    RECEIVE_TIED_PARAMETER = "RECV_P"
    FREE_ACTIVATION = "FREE_F"
    FREE_COTANGENT = "FREE_B"
    FREE_STASH = "FREE_K"


RECEIVE_OF_SEND = {
    Op.SEND_ACTIVATION: Op.RECEIVE_ACTIVATION,
    Op.SEND_COTANGENT: Op.RECEIVE_COTANGENT,
    Op.SEND_TIED_GRADIENT: Op.RECEIVE_TIED_GRADIENT,
    Op.SEND_NORM: Op.RECEIVE_NORM,
    Op.SEND_TIED_PARAMETER: Op.RECEIVE_TIED_PARAMETER,
}
SENDS = frozenset(RECEIVE_OF_SEND)
RECEIVES = frozenset(RECEIVE_OF_SEND.values())
FREES = frozenset((Op.FREE_ACTIVATION, Op.FREE_COTANGENT, Op.FREE_STASH))
"""They take no time."""

COMPUTES = frozenset(Op) - SENDS - RECEIVES - FREES
PER_MICROBATCH = FREES | frozenset(
    (
        Op.FORWARD,
        Op.BACKWARD,
        Op.BACKWARD_INPUT,
        Op.BACKWARD_WEIGHT,
        Op.SEND_ACTIVATION,
        Op.RECEIVE_ACTIVATION,
        Op.SEND_COTANGENT,
        Op.RECEIVE_COTANGENT,
    )
)
"""The others run once a step and carry no microbatch."""

RECEIVE_OF_READER = {
    Op.FORWARD: Op.RECEIVE_ACTIVATION,
    Op.BACKWARD: Op.RECEIVE_COTANGENT,
    Op.BACKWARD_INPUT: Op.RECEIVE_COTANGENT,
    Op.SYNCHRONIZE: Op.RECEIVE_TIED_GRADIENT,
    Op.NORM: Op.RECEIVE_NORM,
}
"""What an operation reads of what its stage received, of the same microbatch.

A received tied parameter is read by the next step.
"""

LAST_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
"""What a stage's gradients are complete behind; it reads what `S` does where both are one launch."""

_PARTNER = RECEIVE_OF_SEND | {receive: send for send, receive in RECEIVE_OF_SEND.items()}
_TEXT = re.compile(
    r"(?P<stage>\d+)(?P<op>(?:SEND_|RECV_)[FBGNP]|FREE_[FBK]|[FBIWSNU])(?P<microbatch>\d+)?"
    r"(?:(?P<arrow>[<>])(?P<peer>\d+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One entry of a submesh's list.

    Attributes:
        op: What to do.
        stage: The stage that does it; its submesh holds the list.
        microbatch: For the operations of `PER_MICROBATCH`, else None.
        peer: The other stage of a send or receive, else None.
    """

    op: Op
    stage: int
    microbatch: int | None = None
    peer: int | None = None

    @property
    def is_send(self) -> bool:
        return self.op in SENDS

    @property
    def is_receive(self) -> bool:
        return self.op in RECEIVES

    @property
    def is_compute(self) -> bool:
        return self.op in COMPUTES

    @property
    def is_free(self) -> bool:
        return self.op in FREES

    @property
    def partner(self) -> "Instruction":
        """Return the receive of this send, or the send of this receive, in the peer's list.

        The send is the identity of a message: no two messages of a step have the same one.
        """
        assert self.peer is not None, f"{self} has no partner"
        return Instruction(
            op=_PARTNER[self.op], stage=self.peer, microbatch=self.microbatch, peer=self.stage
        )

    def is_partner_of(self, other: "Instruction") -> bool:
        """Whether the two are the ends of one message."""
        return (
            (self.stage, self.peer) == (other.peer, other.stage)
            and self.microbatch == other.microbatch
            and _PARTNER.get(self.op) is other.op
        )

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else self.microbatch
        if self.peer is None:
            return f"{self.stage}{self.op}{microbatch}"
        return f"{self.stage}{self.op}{microbatch}{'>' if self.is_send else '<'}{self.peer}"

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        """Read the text form; `str` of the result is the text again."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(_unreadable(text, "not of the form 2F0, 2S or 2SEND_F0>3"))
        op = Op(match["op"])
        instruction = cls(
            op=op,
            stage=int(match["stage"]),
            microbatch=None if match["microbatch"] is None else int(match["microbatch"]),
            peer=None if match["peer"] is None else int(match["peer"]),
        )
        if (op in PER_MICROBATCH) != (instruction.microbatch is not None):
            needs = "needs a" if op in PER_MICROBATCH else "takes no"
            raise ScheduleError(_unreadable(text, f"{op} {needs} microbatch"))
        arrow = ">" if op in SENDS else "<" if op in RECEIVES else None
        if match["arrow"] != arrow:
            needs = "takes no peer" if arrow is None else f"needs its peer as {arrow}3"
            raise ScheduleError(_unreadable(text, f"{op} {needs}"))
        return instruction


def _unreadable(text: str, why: str) -> str:
    return (
        f"cannot read the instruction {text.strip()!r}: {why} "
        "(a program of parallel.schedule): correct it, see docs/schedules.md"
    )
