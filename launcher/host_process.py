"""The process of one host: from a task to trained stages. What it is told and says is in `host_contract`.

It makes its stages as one process makes all of them: the plan is adopted from its text, and the programs,
the pipeline and the training loop are the same. Other hosts are reached by the transport, and every host has
all numbers of a step, so that all decide alike: about numbers that are not finite, checkpoints, and the end.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from functools import partial

import jax

from launcher import data
from launcher.autopar.make_plan import adopt_plan
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import from_json
from launcher.autopar.text.wording import size
from launcher.errors import ConfigError, LostPeerError
from launcher.inputs import build_model, plan_options, train_settings
from launcher.models.model import Model
from launcher.models.optimizer import build_optimizer
from launcher.outputs import find_sampler, make_meter
from launcher.resume import check_start, find_start, make_checkpoints
from launcher.runtime.allocator import keep_freed_memory
from launcher.runtime.checkpoints.checkpointer import Checkpoints
from launcher.runtime.checkpoints.host_copies import on_host_device, own_pieces
from launcher.runtime.checkpoints.shared_store import SharedStore, Writers
from launcher.runtime.checkpoints.weights import open_weights
from launcher.runtime.compiled.compilation_cache import use_cache
from launcher.runtime.hosts.agreement import Agreement
from launcher.runtime.hosts.arrivals import Arrivals
from launcher.runtime.hosts.host_contract import (
    Host,
    HostAddress,
    HostBeat,
    HostEnd,
    HostReady,
    HostTask,
)
from launcher.runtime.hosts.host_executor import HostExecutor
from launcher.runtime.hosts.host_progress import EventLog, EventSink, HostProgress
from launcher.runtime.hosts.host_transport import HostTransport
from launcher.runtime.hosts.post_office import PostOffice, free_port
from launcher.runtime.hosts.shared_clock import SharedClock, over_devices
from launcher.runtime.hosts.worlds import join, world_grid, worlds
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import TrainSummary
from launcher.runtime.steps.local_executor import LocalExecutor, Part
from launcher.runtime.steps.memory_error import memory_error
from launcher.runtime.steps.memory_use import peak_bytes
from launcher.runtime.training import train_loop
from launcher.runtime.training.run_end import RunEnd

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2  # at whether what is received comes
_LOOK_FOR_S = 2.0  # for the receive that has failed, once a step has
_SPEAKER = 0  # the host whose rows and summary count


class HostProcess(Host):
    """See `host_contract.Host`."""

    def __init__(self, task: HostTask):
        self._task = task
        self._arrivals = Arrivals(task.receive_limit_s)
        self._progress = HostProgress(self._arrivals)
        self._office: PostOffice | None = None
        self._executor: HostExecutor | None = None
        self._agreement: Agreement | None = None
        self._goodput = Goodput(task.run_dir if self._speaks else None, started_s=task.started_s)

    @property
    def _speaks(self) -> bool:
        return self._task.host == _SPEAKER

    # Getting ready

    def open(self) -> HostAddress:
        task = self._task
        _check(task)
        return HostAddress(
            host=task.host,
            transfer=f"{task.ip}:{free_port(task.ip)}",
            coordinator=f"{task.ip}:{free_port(task.ip)}",
            token=str(time.time_ns()),
        )

    def prepare(self, addresses: Sequence[HostAddress]) -> HostReady:
        task, config = self._task, self._task.config
        self._progress.phase = "preparing"
        use_cache(config.runtime.compilation_cache)
        if task.emulated:
            keep_freed_memory()
        given = from_json(task.plan_text, source="plan.json")
        hosts = [stage.hosts for stage in given.stages]
        grid = self._join_world(hosts, addresses)
        if _crosses_hosts(given, task.num_hosts):
            transfers = [address.transfer for address in addresses]
            self._office = PostOffice(task.host, transfers, self._arrivals)
        model = build_model(config, task.cluster, given, emulated=task.emulated)
        self._optimizer = build_optimizer(config.optimizer, config.train.steps, model.dtype)
        self._dataset = data.build(config.data, model, config.seed)
        self._start = find_start(config, task.run_dir)
        check_start(self._start, config, model, self._optimizer, self._dataset.name)
        self._sampler = find_sampler(
            config, task.cluster, model, self._dataset, emulated=task.emulated
        )
        options = plan_options(config, given, model, self._optimizer)
        self._planned = adopt_plan(given, model, task.cluster, options)
        self._grid, self._model = grid, model
        local = self._build(model, hosts)
        share = self._transport.from_first_host if self._office else over_devices(grid)
        self._clock = SharedClock(share)
        self._executor = HostExecutor(local, self._progress, self._office, self._clock)
        token = addresses[0].token
        self._writers = Writers(host=task.host, num_hosts=task.num_hosts, token=token)
        self._agreement = Agreement(self._start.step, config.train.steps)
        self._progress.steps_begun = self._progress.steps_done = self._start.step
        self._progress.phase = "ready"
        compilation = local.compilation
        return HostReady(
            host=task.host,
            first_step=self._start.step,
            stages=tuple(stage.index for stage in local.stages),
            num_programs=compilation.num_programs,
            compile_s=compilation.wall_s,
            text=str(compilation),
        )

    def _join_world(self, hosts: Sequence[Sequence[int]], addresses: Sequence[HostAddress]):
        task = self._task
        world = worlds(hosts, task.num_hosts)[task.host]
        kinds = [kind for kind in task.cluster.kinds for _ in range(kind.num_hosts)]
        local = None if task.emulated else kinds[task.host].devices_per_host
        join(world, task.host, addresses[world[0]].coordinator, local)
        return world_grid(world, task.host, task.cluster, emulated=task.emulated)

    def _build(self, model: Model, hosts: Sequence[Sequence[int]]) -> LocalExecutor:
        task, start = self._task, self._start
        own = tuple(index for index, lies in enumerate(hosts) if task.host in lies)
        realized = self._planned.realized
        for index in own:
            partners = [other for other in hosts[index] if other != task.host]
            if partners:
                self._arrivals.partners[realized.program.submesh_of[index]] = partners
        transport = HostTransport(
            hosts, realized.program.submesh_of, task.host, task.num_hosts, self._office,
            lambda: self._progress.doing,
        )  # fmt: skip

        def say(text: str) -> None:
            self._progress.text = text

        local = LocalExecutor(
            realized, model, self._optimizer, self._grid, seed=task.config.seed, progress=say,
            weights=self._first_weights(model),
            restored=start.checkpoint.arrays if start.resumes else None,
            evaluates=task.config.train.eval_batches > 0,
            part=Part(stages=own, transport=transport, watch=self._progress),
        )  # fmt: skip
        if start.checkpoint is not None:
            start.checkpoint.release()
        self._transport = transport
        return local

    def _first_weights(self, model: Model):
        if self._start.checkpoint is not None:
            return self._start.weights(model)
        path = self._task.config.model.weights
        return open_weights(path, model).values(model) if path else None

    # Training

    def train(self) -> HostEnd:
        self._progress.phase = "training"
        self._goodput.went_back(self._start.progress.step_s if self._start.resumes else 0.0)
        self._goodput.ready(self._executor.local.compilation.wall_s)
        ended: Future[TrainSummary] = Future()
        # A thread that waits for a peer that is gone cannot be interrupted: it is left behind.
        threading.Thread(target=self._train_into, args=(ended,), name="steps", daemon=True).start()
        while True:
            try:
                summary = ended.result(timeout=_LOOK_EVERY_S)
                break
            except TimeoutError:
                self._arrivals.check()
            except jax.errors.JaxRuntimeError as error:
                raise self._lost(error) from error
        self._progress.phase = "ended"
        sent, waited_s = self._transport.bytes_sent(), self._arrivals.waited_s
        log.info(
            "host %d: %s sent to other stages, %.2f s waited for other hosts at most",
            self._task.host, size(sum(sent.values())), waited_s,
        )  # fmt: skip
        return HostEnd(
            host=self._task.host,
            steps=summary.steps,
            stopped=self._agreement.requested,
            summary=summary,
            bytes_sent=sent,
            waited_s=waited_s,
        )

    def _lost(self, error: jax.errors.JaxRuntimeError) -> LostPeerError:
        """Whose failure it was, if a receive has failed: it is found out about the same time."""
        try:
            until_s = time.monotonic() + _LOOK_FOR_S
            while time.monotonic() < until_s:
                self._arrivals.check()
                time.sleep(_LOOK_EVERY_S)
        except LostPeerError as named:
            return named
        doing = self._progress.doing or "before the first instruction"
        return LostPeerError(
            f"a step failed on host {self._task.host} ({doing}): {str(error).splitlines()[0][:300]}: "
            f"look at the logs of all hosts: another one may have failed first"
        )

    def _train_into(self, ended: Future[TrainSummary]) -> None:
        try:
            ended.set_result(self._train())
        except BaseException as error:
            ended.set_exception(error)

    def _train(self) -> TrainSummary:
        task, planned = self._task, self._planned
        own = [device for device in self._grid[task.host] if device]
        level = logging.INFO if self._speaks else logging.ERROR
        handler = EventLog(self._progress, level)
        everything = logging.getLogger("launcher")
        everything.setLevel(logging.INFO)
        everything.addHandler(handler)
        try:
            return train_loop.run(
                self._executor,
                self._dataset,
                train_settings(task.config, planned.plan, self._start),
                make_meter(planned, self._model, task.cluster, emulated=task.emulated),
                [EventSink(self._progress, speaks=self._speaks)],
                learning_rate=self._optimizer.schedule,
                explain_memory=partial(memory_error, plan=planned.plan, doing=None, devices=own),
                checkpoints=self._checkpoints(),
                goodput=self._goodput,
                at_end=self._write_end,
                stop=self._agreement,
            )
        finally:
            everything.removeHandler(handler)

    def _checkpoints(self) -> Checkpoints:
        task = self._task
        writers = self._writers if task.num_hosts > 1 else None
        return make_checkpoints(
            self._start, task.config, self._model, self._planned.plan, self._dataset.name,
            self._executor.local.training_arrays, writers=writers, since=self._clock,
            onlooker=self._progress,
        )  # fmt: skip

    def _write_end(self, num_steps: int, stopped: bool) -> None:
        """What is written after the last step, by the first host."""
        task, arrays = self._task, self._executor.local.arrays
        if not (task.config.train.export_weights or self._sampler):
            return
        self._progress.doing = "writing"
        if task.num_hosts > 1:
            store = SharedStore(self._start.store, self._writers)
            gathered = store.gather(task.run_dir, own_pieces(arrays()))
            if not self._speaks:
                return
            # On the host, where there is room for all.
            arrays = partial(on_host_device, gathered)
        end = RunEnd(
            run_dir=task.run_dir,
            model=self._model,
            plan=self._planned.plan,
            arrays=arrays,
            exports=task.config.train.export_weights,
            sampler=self._sampler,
        )
        end(num_steps, stopped)

    # From other threads

    def beat(self) -> HostBeat:
        progress, sent = self._progress, {}
        if self._executor is not None:
            sent = self._transport.bytes_sent()
        return HostBeat(
            host=self._task.host,
            phase=progress.phase,
            progress=progress.text,
            steps_begun=progress.steps_begun,
            steps_done=progress.steps_done,
            stage=progress.stage,
            doing=progress.doing,
            waiting_for=self._arrivals.waiting_for,
            peak_bytes=self._peaks(),
            bytes_sent=sent,
            waited_s=self._arrivals.waited_s,
            events=progress.take_events(),
        )

    def _peaks(self) -> dict[int, int]:
        stages = self._executor.local.stages if self._executor else ()
        peaks = {s.index: peak_bytes(s.programs.mesh.local_devices) for s in stages}
        return {stage: peak for stage, peak in peaks.items() if peak is not None}

    def hold(self) -> int:
        return self._agreement.hold()

    def stop_after(self, step: int) -> None:
        self._agreement.stop_after(step)

    def close(self) -> None:
        self._arrivals.close()
        if self._executor is not None:
            self._executor.close()


def _crosses_hosts(plan: Plan, num_hosts: int) -> bool:
    """Whether something goes from one process to another that is no collective."""
    submeshes = {(stage.hosts, stage.devices) for stage in plan.stages}
    is_shared = all(len(set(hosts)) == num_hosts for hosts, _ in submeshes)
    return num_hosts > 1 and not (is_shared and len(submeshes) == 1)


def _check(task: HostTask) -> None:
    """Raise ConfigError for what only one process can do."""
    asked = task.config.train
    for key, steps in {
        "trace_steps": asked.trace_steps,
        "profile_steps": asked.profile_steps,
    }.items():
        if steps:
            raise ConfigError(
                f"train.{key}={','.join(map(str, steps))} is for one process, and this run has "
                f"{task.num_hosts} (runtime.name={task.config.runtime.name}): leave it out, or take "
                f"runtime=local or runtime=emulate"
            )
