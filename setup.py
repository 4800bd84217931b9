"""What pyproject.toml cannot say: the folder recipes/ is installed as trl_mprm/recipes, for `trl-mprm recipes`."""

from setuptools import find_namespace_packages, setup


setup(
    packages=[*find_namespace_packages(include=["trl_mprm*"]), "trl_mprm.recipes"],
    package_dir={"trl_mprm.recipes": "recipes"},
)
