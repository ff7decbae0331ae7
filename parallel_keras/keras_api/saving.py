"""What is saved and restored: always the template."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from parallel_keras import _compat
from parallel_keras.devices import resolve
from parallel_keras.keras_api.atomic import atomic_path
from parallel_keras.steps import checks
from parallel_keras.steps.wrapper import Wrapper


class Files(Wrapper):
    """Saves and restores the template: files hold nothing of the wrapper.

    It needs the template, the request and whether this worker writes, and gives files, configs
    and what is made of them again.
    """

    def save(self, filepath: Any, overwrite: bool = True, *args: Any, **kwargs: Any) -> None:
        """Saves the template, with its compile arguments and optimizer state.

        The file loads with `keras.saving.load_model` where parallel_keras is not
        installed, on any number of devices. It is written whole or not at all.

        Args:
            filepath: Path, ends in `.keras` (or `.h5`).
            overwrite: Whether to overwrite what is there, rather than to ask.
                Defaults to `True`.
            *args: As in `keras.Model.save`.
            **kwargs: As in `keras.Model.save`.
        """
        if self._writes and _may_write(filepath, overwrite):
            with _place(filepath) as path:
                self.template.save(path, True, *args, **kwargs)

    def save_weights(
        self, filepath: Any, overwrite: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves the template's weights and, if it is compiled, its optimizer's state.

        Args:
            filepath: Path, ends in `.weights.h5`. It is written whole or not at all.
            overwrite: Whether to overwrite what is there, rather than to ask.
                Defaults to `True`.
            *args: As in `keras.Model.save_weights`.
            **kwargs: As in `keras.Model.save_weights`.
        """
        if self._writes and _may_write(filepath, overwrite):
            with _place(filepath) as path:
                self.template.save_weights(path, True, *args, **kwargs)

    @property
    def _writes(self) -> bool:
        """Whether this worker writes files: of several with the same weights the first does."""
        return self._runtime.workers.chief

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Loads weights into the template.

        Args:
            filepath: Path that `save_weights` of this or of the template wrote.
            *args: As in `keras.Model.load_weights`.
            **kwargs: As in `keras.Model.load_weights`.
        """
        self.template.load_weights(filepath, *args, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the template for inference; the file names no device.

        Args:
            filepath: Path of the SavedModel folder. It is written whole or not at all.
            *args: As in `keras.Model.export`.
            **kwargs: As in `keras.Model.export`.
        """
        if self._writes:
            with _place(filepath) as path:
                self.template.export(path, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, the template nested in them.

        Returns:
            A dict.
        """
        return {
            "template": keras.saving.serialize_keras_object(self.template),
            "name": self.name,
            "loss_on": self.loss_on,
            **self.request,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes a model from `get_config()`.

        Args:
            config: Dict; it is not changed.
            custom_objects: Dict from names to classes. Defaults to `None`.

        Returns:
            The model, on the devices that were asked for when it was saved, or,
            with a warning, on those that exist.
        """
        arguments = dict(config)
        arguments["template"] = keras.saving.deserialize_keras_object(
            arguments["template"], custom_objects=custom_objects
        )
        for name, instead in (
            ("devices", None),
            ("merge_device", "/CPU:0"),
            ("weights_on", "auto"),
        ):
            wanted: Any = arguments.get(name, instead)
            try:
                if name == "weights_on":
                    checks.place_of_weights(wanted)
                else:
                    resolve([wanted] if name == "merge_device" else wanted)
            except ValueError:
                logging.warning(
                    "This model was saved for %s=%r, which this machine does not have: using %s.",
                    name,
                    wanted,
                    instead or [device.name for device in tf.config.list_logical_devices()],
                )
                arguments[name] = instead
        return cls(**arguments)

    def to_json(self, **kwargs: Any) -> str:
        """The template's architecture, which loads where this library does not exist.

        Args:
            **kwargs: As in `keras.Model.to_json`.

        Returns:
            A string.
        """
        return self.template.to_json(**kwargs)

    def get_compile_config(self) -> dict[str, Any] | None:
        """The template's compile arguments, serialised.

        Returns:
            A dict, or `None` if it is not compiled.
        """
        return self.template.get_compile_config()


def _may_write(filepath: Any, overwrite: bool) -> bool:
    free = overwrite or _is_remote(filepath) or not Path(filepath).exists()
    return free or _compat.may_overwrite(filepath)


def _place(filepath: Any) -> contextlib.AbstractContextManager[Any]:
    """Where to write: Keras itself sends what goes to an address such as `hf://`."""
    return contextlib.nullcontext(filepath) if _is_remote(filepath) else atomic_path(filepath)


def _is_remote(filepath: Any) -> bool:
    return "://" in str(filepath)
