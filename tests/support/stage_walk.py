"""The price of a stage of one layer, added up slowly: an oracle for what the planner charges."""

import numpy as np

from launcher.autopar.intra_op.stage_seconds import Seconds
from launcher.autopar.sharding.param_costs import optimizer_spec
from launcher.autopar.sharding.reshard import reshard, reshard_cost
from launcher.autopar.sharding.rules import axis_choices
from launcher.autopar.sharding.spec import num_shards


class Walk:
    """The price of a stage of one layer, added up op by op from its picks."""

    def __init__(self, planner, sharding):
        (self.cls,) = planner.model.classes
        self.model, self.picks, self.settings = planner.model, sharding.picks, sharding.settings
        self.mesh = sharding.settings.mesh
        self.where = {}  # value -> its spec
        for kind, values in (
            ("slot", dict(enumerate(self.cls.joint.inputs[: self.cls.num_slots]))),
            ("cotangent", self.cls.cotangents),
        ):
            self.where |= {value: self.pick(kind, i) for i, value in values.items()}
        self.steps = {"forward": [], "backward_input": [], "backward_weight": []}
        self.copied = set()
        self.again = set(map(id, self.cls.recomputed_ops()))
        self.runs_again, self.brought, self.shared_s = False, set(), {}

    def pick(self, kind, index):
        return self.picks[kind, self.cls.name, index]

    def move(self, value, target, phase=None):
        """Seconds to bring a value to a spec, by way of its copy in this phase; notes the collectives."""
        program = phase and phase.partition("_")[0]  # both halves of the backward pass share copies
        copy = self.picks.get((f"{program}_copy", self.cls.name, value))
        if copy is None:
            return self.reshard(value, self.where[value], target, phase)
        seconds = 0.0
        if (program, value) not in self.copied:
            self.copied.add((program, value))
            seconds = self.reshard(value, self.where[value], copy, phase)
        return seconds + self.reshard(value, copy, target, phase)

    def reshard(self, value, source, target, phase):
        aval = self.cls.joint.avals[value]
        arguments = (aval.shape, aval.dtype.itemsize, source, target, self.mesh)
        if phase is not None:
            self.steps[phase] += [step for step in reshard(*arguments) if step.kind.communicates]
        seconds = reshard_cost(*arguments)
        if phase == "forward" and self.runs_again:
            self.brought.add((value, target))
        elif phase in ("backward_input", "backward_weight") and (value, target) in self.brought:
            self.shared_s[phase] = self.shared_s.get(phase, 0.0) + seconds
        return seconds

    def op_s(self, index, op, phase):
        strategy = self.pick("op", index)
        assert all(axis in axis_choices(op) for axis in strategy.axes)
        division = 1
        for axis, size in zip(strategy.axes, self.mesh.shape, strict=True):
            if any(entry >= 0 for entry in (*axis.operands, *axis.results)):
                division *= size
        seconds = self.settings.compute.op_s(op) / division
        for position, operand in enumerate(op.operands):
            if isinstance(operand, int):
                seconds += self.move(operand, strategy.operand_spec(position), phase)
        for position, value in enumerate(op.results):
            self.where[value] = strategy.result_spec(position)
            local = (
                4
                * np.prod(op.eqn.outvars[position].aval.shape)
                / num_shards(self.where[value], self.mesh.shape)
            )
            seconds += sum(
                self.mesh.all_reduce(axis, local)
                for axis, choice in enumerate(strategy.axes)
                if choice.combine
            )
        return seconds

    def price(self):
        cls = self.cls
        members = {
            "forward": {id(op) for op in cls.forward_ops},
            "backward_input": {id(op) for op in cls.input_ops},
            "backward_weight": {id(op) for op in cls.weight_ops},
        }
        total = dict.fromkeys(members, 0.0)
        for phase, ops in members.items():
            for index, op in enumerate(cls.joint.ops):
                if id(op) in ops:
                    self.runs_again = id(op) in self.again
                    total[phase] += self.op_s(index, op, phase)
        self.runs_again = False
        for output, value in enumerate(cls.outputs):
            total["forward"] += self.move(value, self.pick("export", output), "forward")
        synchronize = update = 0.0
        for slot, value in cls.gradients.items():
            home, accumulator = self.pick("slot", slot), self.pick("accumulator", slot)
            total["backward_weight"] += self.move(value, accumulator, "backward_weight")
            aval = cls.joint.avals[value]
            zero = self.settings.zero
            state = optimizer_spec(home, aval.shape, self.mesh, zero)
            synchronize += self.reshard(value, accumulator, home if zero == 1 else state, None)
            synchronize += self.reshard(value, state, home, None)
            num_bytes = 4 * np.prod(aval.shape) / num_shards(state, self.mesh.shape)
            update += 7 * num_bytes / self.settings.compute.device.memory_bytes_per_s
        return Seconds(
            **total, shared_input=self.shared_s.get("backward_input", 0.0),
            shared_weight=self.shared_s.get("backward_weight", 0.0),
            synchronize=synchronize, update=update,
        )  # fmt: skip
