"""From what a user writes to the devices that exist."""

from collections.abc import Sequence

import tensorflow as tf

Devices = int | Sequence[int | str] | None


def resolve(devices: Devices = None) -> tuple[str, ...]:
    """Turns a request for devices into canonical names of devices that exist.

    Args:
        devices: `None` for all GPUs, or all logical CPUs where there is no GPU;
            an int for the first that many of them; or a list of GPU ids and
            device names in any spelling TensorFlow accepts. Defaults to `None`.

    Returns:
        The names as TensorFlow's runtime spells them, in the order asked for.

    Raises:
        ValueError: If a device does not exist, is named twice, or none is left.
        TypeError: If `devices` is of another type.

    Example:
    >>> from parallel_keras import devices
    >>> devices.resolve(["CPU:1", "/cpu:0"])
    ('/device:CPU:1', '/device:CPU:0')
    """
    existing = [device.name for device in tf.config.list_logical_devices()]
    if devices is None:
        return tuple(_default_devices(existing))
    if isinstance(devices, bool) or not isinstance(devices, (int, Sequence)):
        raise TypeError(
            "Expected `devices` to be None, an int, or a list of GPU ids and device names. "
            f"Received: devices={devices!r} (of type {type(devices).__name__}). "
            f'Write for example devices=2 or devices=["{existing[-1]}"].'
        )
    if isinstance(devices, str):
        raise TypeError(
            "Expected `devices` to be a list, also for one device. "
            f"Received: devices={devices!r}. Write devices=[{devices!r}]."
        )
    if isinstance(devices, int):
        return tuple(_first(devices, existing))
    names = [_find(device, existing) for device in devices]
    if not names:
        raise ValueError(
            f"Expected at least one device. Received: devices={devices!r}. {_what_exists(existing)}"
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Expected every device once, but {name} is named more than once. "
                f"Received: devices={list(devices)!r}. {_what_exists(existing)}"
            )
    return tuple(names)


def virtual_devices(
    count: int, device_type: str = "CPU", memory_limit: int | None = None
) -> list[str]:
    """Splits one physical device into several logical ones.

    This lets a machine without GPUs (or with one) run on several devices: to
    try a script, to test it, or to use the cores of a CPU as devices. It must
    run before TensorFlow starts its runtime, that is, before the first tensor,
    variable or model is made.

    Args:
        count: Int, the number of logical devices, at least 1.
        device_type: String, `"CPU"` or `"GPU"`. The first physical device of
            that type is the one that is split. Defaults to `"CPU"`.
        memory_limit: Int, megabytes of memory for each logical device; needed
            for GPUs, not possible for CPUs. Defaults to `None`.

    Returns:
        The names of the logical devices, a list of `count` strings.

    Raises:
        ValueError: If TensorFlow has already started with other devices, if
            there is no physical device of that type, or if an argument does
            not fit.
        TypeError: If `count` is not an int.

    Example:
    ```python
    devices = pk.virtual_devices(2)  # ['/device:CPU:0', '/device:CPU:1']
    parallel = pk.DataParallelModel(model, devices)
    ```
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(
            "Expected `count` to be an int. "
            f"Received: count={count!r} (of type {type(count).__name__})."
        )
    if count < 1:
        raise ValueError(f"Expected `count` to be at least 1. Received: count={count}.")
    kind = device_type.upper()
    if kind == "CPU" and memory_limit is not None:
        raise ValueError(
            "Expected no `memory_limit` for CPUs: TensorFlow cannot limit their memory. "
            f"Received: memory_limit={memory_limit}. Leave it out."
        )
    if kind != "CPU" and count > 1 and memory_limit is None:
        raise ValueError(
            f"Expected `memory_limit` (megabytes for each logical {kind}), because logical "
            f"{kind}s share one memory. Received: memory_limit=None. "
            f'Write for example virtual_devices({count}, "{kind}", memory_limit=2048).'
        )
    physical = tf.config.list_physical_devices(kind)
    if not physical:
        found = sorted({device.device_type for device in tf.config.list_physical_devices()})
        raise ValueError(
            f"Expected a physical device of type {kind!r}, but there is none. "
            f"Received: device_type={device_type!r}. Types on this machine: {found}."
        )
    configuration = [tf.config.LogicalDeviceConfiguration(memory_limit=memory_limit)] * count
    try:
        tf.config.set_logical_device_configuration(physical[0], configuration)
    except RuntimeError as error:
        raise ValueError(
            "virtual_devices must run before TensorFlow starts its runtime, and it has already "
            "started (something made a tensor, a variable or a model, or listed the logical "
            f"devices). Received: count={count}, device_type={device_type!r}. "
            "Move the call to the top of the script, right after the imports."
        ) from error
    return [f"/device:{kind}:{index}" for index in range(count)]


def check_one_job(names: Sequence[str]) -> None:
    """Refuses devices over which nothing can be added up in the middle of a tower.

    Args:
        names: Sequence of canonical device names.

    Raises:
        ValueError: If some are of this process and others of servers that it is
            connected to, or if the servers are of several jobs. The devices of
            each job find each other with a leader of their own, and would wait for
            the others for ever.
    """
    if len({tf.DeviceSpec.from_string(name).job for name in names}) > 1:
        raise ValueError(
            "A layer with synchronized=True adds up over all towers, which TensorFlow cannot do "
            "over several jobs. Expected: only devices of this process, or only devices of one "
            f"job of servers. Received: devices={list(names)}. Leave out those of the other "
            "jobs, or build the layer with synchronized=False."
        )


def _default_devices(existing: list[str]) -> list[str]:
    gpus = [name for name in existing if ":GPU:" in name.upper()]
    return gpus or [name for name in existing if ":CPU:" in name.upper()]


def _first(count: int, existing: list[str]) -> list[str]:
    candidates = _default_devices(existing)
    if not 1 <= count <= len(candidates):
        raise ValueError(
            f"Expected `devices` between 1 and {len(candidates)}, the number of devices to use. "
            f"Received: devices={count}. {_what_exists(existing)}"
        )
    return candidates[:count]


def _find(device: int | str, existing: list[str]) -> str:
    if isinstance(device, bool) or not isinstance(device, (int, str)):
        raise TypeError(
            "Expected every entry of `devices` to be a GPU id (int) or a device name (string). "
            f"Received: {device!r} (of type {type(device).__name__})."
        )
    name = f"/device:GPU:{device}" if isinstance(device, int) else device
    try:
        wanted = tf.DeviceSpec.from_string(name if name.startswith("/") else f"/{name}")
    except ValueError as error:
        raise ValueError(
            'Expected a device name such as "GPU:1" or "/device:CPU:0". '
            f"Received: {device!r}. {_what_exists(existing)}"
        ) from error
    if wanted.device_type is not None:
        for candidate in existing:
            if _answers_to(tf.DeviceSpec.from_string(candidate), wanted):
                return candidate
    raise ValueError(
        f"Expected a device of this machine. Received: {device!r}, which does not exist. "
        f"{_what_exists(existing)}"
    )


def _answers_to(candidate: tf.DeviceSpec, wanted: tf.DeviceSpec) -> bool:
    """Whether every field that the user gave is the candidate's.

    A name without an index means the first device of its type, as in
    `tf.device("/GPU")`. TensorFlow leaves the job out of the names of this
    process' devices, but writes it into what tensors say of their device.
    """
    index = 0 if wanted.device_index is None else wanted.device_index
    here = candidate.job is None
    return (
        candidate.device_type.upper() == wanted.device_type.upper()
        and candidate.device_index == index
        and wanted.job in (None, "localhost" if here else candidate.job)
        and wanted.replica in (None, 0 if here else candidate.replica)
        and wanted.task in (None, 0 if here else candidate.task)
    )


def _what_exists(existing: list[str]) -> str:
    count = len(_default_devices(existing))
    return (
        f"Devices of this machine: {existing}. Leave `devices` out to use {count} of them; "
        "virtual_devices(n) makes n CPU devices to try things on."
    )
