"""Micro-batches: each runs the user's own loss function in a thread of its own; one baton lets exactly one run.

A block's forward, called in such a thread, hands the baton to the scheduler and sleeps until its reply is there. The
operations of the glue between blocks (the loss on the logits, say) are handed over too and run in the scheduler's
thread: a second thread that enters OpenMP would bring a second pool of threads for the same cores.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from weightstream.errors import AuditError
from weightstream.worker.generators import Generators, State


@dataclass(slots=True)
class Modes:
    """The thread-local state of autograd and autocast under which a call was made."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def capture(cls, device: torch.device) -> "Modes":
        types = {"cpu", device.type}
        return cls(
            torch.is_grad_enabled(),
            tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in sorted(types)),
            torch.is_autocast_cache_enabled(),
        )

    def enter(self, stack: Any, *, grad: bool | None = None) -> None:
        """Enters these modes on an `ExitStack`; `grad` overrides the grad mode."""
        stack.enter_context(torch.set_grad_enabled(self.grad if grad is None else grad))
        for device_type, enabled, dtype in self.autocast:
            if enabled or torch.is_autocast_enabled(device_type):
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
                )  # a cached cast would outlive the slab that it was made from


@dataclass(slots=True)
class Request:
    """A call of a block, made by a micro-batch that sleeps until it is answered."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: Modes


class MicroBatch:
    """One micro-batch on its way through the model; `request` is what it waits for, None once it has its loss."""

    def __init__(
        self,
        index: int,
        run: Callable[[], Tensor],
        generators: Generators,
        device: torch.device,
        audit: Callable[[Any], None],
        cut: Callable[[Any], Any],
    ) -> None:
        self.index = index
        self.request: Request | None = None
        self.loss: Tensor | None = None
        self.rng: State | None = None
        self._run, self._generators, self._device, self._audit = run, generators, device, audit
        self._cut = cut
        self.superseded: dict[int, Tensor] = {}  # tensors that were changed in place: their old selves must not be used
        self._reply: Any = None
        self._job: Callable[[], Any] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._baton, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True, name=f"micro-batch {index}")
        self._started = False

    # in the micro-batch's thread

    def _main(self) -> None:
        self._baton.acquire()
        _current.micro_batch = self
        try:
            if not self._stopped:
                with _Glue(self, self._audit, self._cut):
                    self.loss = self._run()
        except BaseException as error:
            self._error = error
        finally:
            self.request = None
            self._back.release()

    def call(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Asks for a block, sleeps, and returns what the scheduler computed."""
        self.request = Request(module, args, kwargs, Modes.capture(self._device))
        args, kwargs = (), {}
        self._switch()
        reply, self._reply = self._reply, None
        return reply

    def delegate(self, job: Callable[[], Any]) -> Any:
        """Has the scheduler's thread run `job` and returns what it returned."""
        self._job = job
        self._switch()
        reply, self._reply = self._reply, None
        if isinstance(reply, _Raised):
            raise reply.error
        return reply

    def _switch(self) -> None:
        self._back.release()
        self._baton.acquire()
        if self._stopped:
            raise _StoppedError

    def changed_in_place(self, operation: str, tensor: Tensor) -> AuditError:
        """The refusal of a tensor whose graph was cut before it was changed in place."""
        return AuditError(
            f"between blocks, {operation} changes a tensor of shape {tuple(tensor.shape)} in place that a block or another "
            f"operation gave, and it is used afterwards: its graph was cut there; use the out-of-place operation (x = x + y)"
        )

    # in the scheduler's thread

    def resume(self, reply: Any = None, seed: int | None = None) -> None:
        """Lets the micro-batch run to its next block or its end, under its own random state.

        Raises:
            BaseException: whatever the user's loss function raised.
        """
        if seed is not None:
            self._generators.seed(seed)
            self._thread.start()
            self._started = True
        elif self.rng is not None:
            self._generators.restore(self.rng)
        self.request, self._reply = None, reply
        reply = None
        while True:
            self._baton.release()
            self._back.acquire()
            job, self._job = self._job, None
            if job is None:
                break
            try:
                self._reply = job()
            except BaseException as error:
                self._reply = _Raised(error)
        self.rng = self._generators.state()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the thread wherever it sleeps."""
        self._stopped = True
        if self._started:
            self._baton.release()
            self._thread.join(timeout=10)


class _Current(threading.local):
    micro_batch: MicroBatch | None = None


_current = _Current()


def current() -> MicroBatch | None:
    """The micro-batch whose thread this is, if it is one's."""
    return _current.micro_batch


@dataclass(slots=True)
class _Raised:
    error: BaseException


class _StoppedError(BaseException):
    """Unwinds the thread of a micro-batch whose step was abandoned."""


class _Glue(TorchFunctionMode):
    """Sees every torch call between blocks: audits parameters used outside their block, hands the work over,
    and cuts the graph behind each."""

    def __init__(self, micro_batch: MicroBatch, audit: Callable[[Any], None], cut: Callable[[Any], Any]) -> None:
        super().__init__()
        self._micro_batch, self._audit, self._cut = micro_batch, audit, cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _READS:
            return func(*args, **kwargs)
        computes = False  # what takes no tensor sets modes of this thread, or makes a tensor out of nothing
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor):
                    computes = True
                    if isinstance(item, nn.Parameter):
                        self._audit(item)
                    elif id(item) in self._micro_batch.superseded:
                        raise self._micro_batch.changed_in_place("an operation", item)
        if _get_current_dispatch_mode() is not None or torch._C._functorch.maybe_current_level() is not None:
            return func(*args, **kwargs)
        try:
            result = self._hand_over(func, args, kwargs) if computes else func(*args, **kwargs)
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            result = self._instead_of_in_place(func, args, kwargs, error)
        return self._cut(result) if torch.is_grad_enabled() else result

    def _instead_of_in_place(self, func: Any, args: Any, kwargs: Any, error: RuntimeError) -> Any:
        """`x += y` on a tensor whose graph was cut: computed out of place, and `x` itself may not be used any more."""
        old = args[0]
        new = old.clone()
        result = func(new, *args[1:], **kwargs)
        if result is not new:
            raise self._micro_batch.changed_in_place(getattr(func, "__name__", str(func)), old) from error
        self._micro_batch.superseded[id(old)] = old
        return result

    def _hand_over(self, func: Any, args: Any, kwargs: Any) -> Any:
        modes = Modes.capture(self._micro_batch._device)

        def job() -> Any:
            with ExitStack() as stack:
                modes.enter(stack)
                return func(*args, **kwargs)

        return self._micro_batch.delegate(job)


_READS = frozenset({"__get__", "__set__", "size", "dim", "numel", "is_floating_point", "stride", "data_ptr", "detach_"})
