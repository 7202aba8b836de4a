"""A graph in plain ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgetune.errors import EdgetuneError, first_line
from edgetune.runtime import checks, kernels
from edgetune.runtime.cancel import Cancel, watched
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.hardware import checked_threads


class Graph:
    """One ONNX graph, loaded. Several threads may run it at once.

    Args:
        file: the graph; its weights lie beside it.
        threads: CPU threads; all cores when None.

    Raises:
        InputError: `threads` is below 1, or far more than this machine has cores.
        EdgetuneError: ONNX Runtime cannot load it.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = checked_threads(threads)
        for key, value in kernels.session_options(file).items():
            options.add_session_config_entry(key, value)
        self._file = file
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise self._failed("ONNX Runtime cannot load the graph", error) from error
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def close(self) -> None:
        """Free it, once what runs has ended."""
        self._session = None

    def run(self, feeds: dict[str, NDArray[Any]], how: Any = None) -> list[NDArray[Any]]:
        """The outputs for these inputs, in the graph's order; see `run_values`."""
        values = {name: value_of(feed) for name, feed in feeds.items()}
        return [value.numpy() for value in self.run_values(values, how)]

    def run_values(self, feeds: dict[str, Any], how: Any = None) -> Sequence[Any]:
        """The same with ONNX Runtime's own values, which are not copied.

        Args:
            feeds: the inputs.
            how: what `interruptible` gave.

        Raises:
            Interrupted: it was cancelled.
            EdgetuneError: it fails, or is closed.
        """
        session = self._session
        if session is None:
            raise checks.closed()
        try:
            return session.run_with_ort_values(self.outputs, feeds, how)
        except Exception as error:
            if how is not None and how.terminate:
                raise Interrupted from None
            raise self._failed("the graph fails", error) from error

    def _failed(self, what: str, error: Exception) -> Exception:
        """The error to raise for one of ONNX Runtime's; what is none of its own is left as it is."""
        own = type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError)
        fix = "export it again; `edgetune doctor` checks the installation"
        return EdgetuneError(f"{what}: {first_line(error)[:300]}", where=self._file, fix=fix) if own else error


@contextlib.contextmanager
def interruptible(cancel: Cancel | None) -> Iterator[Any]:
    """Gives runs in the block what lets `cancel` end them, amid the graph, too."""
    import onnxruntime

    how = onnxruntime.RunOptions()
    if cancel is None:
        yield how
        return

    def interrupt() -> None:
        how.terminate = True

    with watched(cancel, interrupt):
        yield how


def value_of(array: NDArray[Any]) -> Any:
    """An array as ONNX Runtime's value; both share memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
