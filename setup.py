"""Names the packages: those under dist_moe/, and launch/, installed under names that nobody else uses."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["dist_moe", "dist_moe.*"]),
        "dist_moe.launch",
        "dist_moe_entry",
    ],
    package_dir={"dist_moe.launch": "launch", "dist_moe_entry": "launch/entry"},
)
