"""What pytest-benchmark keeps of a machine: not its name."""

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out the names of host and kernel, which say nothing about its speed."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
