"""What pyproject.toml has no words for: the folder `configs` of the repository is data of `zoo` in the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kernels*", "zoo*"]), "zoo.configs"],
    package_dir={"zoo.configs": "configs"},
)
