"""What pytest-benchmark keeps of a machine: not its name."""

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out the host's name, which says nothing about its speed."""
    machine_info.pop("node", None)
