"""One stage of a realized plan: what it shards how, and what enters and leaves it."""

from dataclasses import dataclass

from launcher.autopar.intra_op.intra_op import StageSharding
from launcher.autopar.intra_op.stage_layout import StageLayout
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.plans.plan import Stage
from launcher.autopar.realized.emit import StageEmitter
from launcher.autopar.sharding.crossing import Located
from launcher.autopar.sharding.spec import Spec


@dataclass(frozen=True, slots=True, eq=False)
class RealizedStage:
    """One stage, ready to be compiled."""

    stage: Stage
    settings: StageSettings
    sharding: StageSharding
    layout: StageLayout
    emitter: StageEmitter

    def located(self, spec: Spec) -> Located:
        """How the stage's devices hold a value of this spec."""
        places = tuple((host, device) for host in self.stage.hosts for device in self.stage.devices)
        return Located(spec, self.settings.mesh.shape, places)
