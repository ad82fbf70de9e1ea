"""Contexts: where attention is computed, with how many threads."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Any, NoReturn

from umfa._library import NULL, error_of_call, ffi, lib
from umfa._scalars import choice, integer
from umfa.errors import InvalidContextError, InvalidTypeError

__all__ = ["MFAContext", "context_for", "default_context"]

_DEVICES = {name: ffi.integer_const(f"MFA_DEVICE_{name.upper()}") for name in ("auto", "cpu", "metal", "softmetal")}
_MAXIMUM_THREADS = 256


def _destroy(created: Any, process: int, destroy: Any = lib.mfa_destroy_context, current_process: Any = os.getpid) -> None:
    # A context that a forked child drops by itself is its parent's: a thread that does not exist in the child may have been inside.
    if created[0] and current_process() == process:
        destroy(created[0])


class MFAContext:
    """A device with its threads and its workspace.

    A context serves one call at a time; a second thread that uses it waits. Give each thread its own for calls that run side by side,
    or pass none to functions that take one as an option: they use one default context a thread.

    A context works in a child after ``fork()`` (on the CPU). It is closed at the end of a ``with`` block, by `close`, or when it is
    collected.

    Parameters
    ----------
    device : {"auto", "cpu", "metal", "softmetal"}
        Where to compute: ``"auto"`` is Metal where there is one, else the CPU.
    num_threads : int, optional
        Threads of a call on the CPU, 1 to 256, the caller's included. By default the environment variable ``MFA_NUM_THREADS`` if set, else
        what the affinity mask and the control group's quota allow. Results do not depend on it.

    Raises
    ------
    DeviceUnavailableError
        If the device is not here, or an environment variable asks for what is not.
    InvalidArgumentError
        For an unknown device or an illegal number of threads.

    Examples
    --------
    >>> with umfa.MFAContext(num_threads=2) as context:
    ...     output = umfa.attention(q, k, v, context=context)
    """

    __slots__ = ("__weakref__", "_finalizer", "_handle", "_lock")

    def __init__(self, device: str = "auto", num_threads: int | None = None) -> None:
        function = "umfa.MFAContext"
        self._lock = threading.RLock()
        self._handle = NULL
        options = ffi.new("mfa_context_options_t *")
        options.struct_size = ffi.sizeof("mfa_context_options_t")
        options.device = _DEVICES[choice(function, "device", device, _DEVICES)]
        options.num_threads = 0 if num_threads is None else integer(function, "num_threads", num_threads, 1, _MAXIMUM_THREADS)
        created = ffi.new("mfa_context_t **")
        # There before the context is, which an interrupt may follow at once.
        self._finalizer = weakref.finalize(self, _destroy, created, os.getpid())
        self._finalizer.atexit = False  # the process's end frees all, and a daemon thread may still be inside
        status = lib.mfa_create_context_with_options(options, created)
        if status:
            raise error_of_call(function, status, NULL)
        self._handle = created[0]
        _contexts.add(self)

    def close(self) -> None:
        """Destroy the context; waits for a call that another thread has in it. Closing twice is harmless."""
        with self._lock:
            if self._handle:
                # An interrupt in between leaves a handle that is destroyed, which the library knows, never one that is forgotten.
                lib.mfa_destroy_context(self._handle)
                self._handle = NULL
                self._finalizer.detach()

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return not self._handle

    @property
    def device(self) -> str:
        """``"cpu"``, ``"metal"`` or ``"softmetal"``."""
        return str(self.details()["device"])

    @property
    def num_threads(self) -> int:
        """Threads that a call uses on the CPU."""
        return int(self.details()["num_threads"])

    def details(self) -> dict[str, Any]:
        """What the context is and can do.

        Returns
        -------
        dict
            ``device``, ``num_threads``, ``instruction_set`` (that the CPU kernels in use were compiled for), ``operand_precisions`` and
            ``fallback_precisions`` (bit n set: operands of precision code n are served; are left to the CPU), ``workspace_bytes`` (held
            now), ``gpu_seconds`` (that the GPU was at work for the last call, 0 if it was not).

        Raises
        ------
        InvalidContextError
            If the context is closed.
        """
        found = ffi.new("mfa_context_info_t *")
        found.struct_size = ffi.sizeof("mfa_context_info_t")
        self.call("umfa.MFAContext.details", lib.mfa_context_get_info, found)
        return {
            "device": _text(found.device_name),
            "num_threads": found.num_threads,
            "instruction_set": _text(found.instruction_set),
            "operand_precisions": found.operand_precisions,
            "fallback_precisions": found.fallback_precisions,
            "workspace_bytes": found.workspace_bytes,
            "gpu_seconds": found.gpu_seconds,
        }

    def call(self, function: str, c_function: Any, *arguments: Any) -> None:
        """Call a function of libmfa on this context; raise what its status stands for. The interpreter's lock is released meanwhile.

        Parameters
        ----------
        function : str
            The Python function that the user called, for messages.
        c_function : callable
            The function of libmfa.
        *arguments
            Its arguments after the context. The caller keeps all memory behind them alive.
        """
        # The lock keeps the message of a failed call from being replaced by another thread's while it is read.
        with self._lock:
            if not self._handle:
                raise InvalidContextError(f"{function}: context: expected an open context, got a closed one")
            status = c_function(self._handle, *arguments)
            if status:
                raise error_of_call(function, status, self._handle)

    def _run_forward(self, function: str, attention: Any) -> None:
        """`call` of ``mfa_attention_run_forward``, for calls that are over so soon that passing on any number of arguments shows."""
        with self._lock:
            if not self._handle:
                raise InvalidContextError(f"{function}: context: expected an open context, got a closed one")
            status = lib.mfa_attention_run_forward(self._handle, attention)
            if status:
                raise error_of_call(function, status, self._handle)

    def __enter__(self) -> MFAContext:
        if not self._handle:
            raise InvalidContextError("umfa.MFAContext: context: expected an open context, got a closed one")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self._handle:
            return "<umfa.MFAContext, closed>"
        details = self.details()
        return f"<umfa.MFAContext on {details['device']}, {details['num_threads']} threads, {details['instruction_set']} kernels>"

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError("umfa.MFAContext: a context cannot be copied or pickled; create one where it is needed")


def _text(string: Any) -> str:
    return ffi.string(string).decode() if string else ""


_contexts: weakref.WeakSet[MFAContext] = weakref.WeakSet()
_default = threading.local()


def default_context() -> MFAContext:
    """The calling thread's default context, created at its first use; a forked child gets its own."""
    context: MFAContext | None = getattr(_default, "context", None)
    if context is None or not context._handle:
        context = _default.context = MFAContext()
    return context


def context_for(function: str, context: MFAContext | None) -> MFAContext:
    """The context to use for an argument that may be None."""
    if context is None:
        return default_context()
    if not isinstance(context, MFAContext):
        raise InvalidTypeError(f"{function}: context: expected an umfa.MFAContext, got {type(context).__name__}")
    return context


def _start_anew_in_child() -> None:
    # Threads that held these locks, or whose default context this was, do not exist here.
    global _default
    _default = threading.local()
    for context in list(_contexts):
        context._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
