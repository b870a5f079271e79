"""Settings of every test of this repository, and the options of the scenarios on clusters."""

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("tercet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tercet")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which cluster the scenarios run on (e2e/README.md, Providers).

    pytest-kind brings --kubeconfig and --kind-image.
    """
    group = parser.getgroup("tercet", "clusters for scenarios")
    group.addoption(
        "--provider",
        choices=("kind", "existing", "local"),
        default="kind",
        help="kind makes a cluster; existing takes --kubeconfig; local: processes of this machine",
    )
    group.addoption("--values", default=None, help="existing: a file of values for the chart")
    group.addoption("--workload-image", default=None, help="existing: the database's image")
    group.addoption("--shared", default="", help="existing: HERE:THERE, a folder all workers see")
    group.addoption("--node-power", default="", help="existing: a command, takes off|stop|on NODE")
    group.addoption("--upgrade-tag", default=None, help="existing: the images to upgrade to")
