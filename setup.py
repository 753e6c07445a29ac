"""What `pip install` needs to know: metadata, requirements, extras and the two commands.

`mellow_ds` and `shards` are installed, nothing else. REQUIREMENTS and EXTRAS stay plain literals: the set-up reads them
from here as text (launch/has_requirements.py, launch/setup_env.sh), so that what is required stands in one place.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

REQUIREMENTS = [
    # torchaudio's wheel is linked against the torch of its own release, and 2.11 is the newest of both that exists
    "torch>=2.11,<2.12",
    "torchaudio>=2.11,<2.12",
    "deepspeed>=0.19,<0.20",
    "transformers>=5.17,<6",
    "webdataset>=1.0,<2",
    "soundfile>=0.12",
    "numpy>=2.0",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "xxhash>=3.0",
    "msgspec>=0.19",
    "urllib3>=2.2",
    "fsspec>=2024.6",
    "tqdm>=4.60",
    "pyyaml>=6.0",
    "tensorboard>=2.16",
    "nvidia-ml-py>=12",
    "pycocoevalcap>=1.2",
]

EXTRAS = {
    "lora": ["peft>=0.18"],
    "plot": ["matplotlib>=3.8"],
    "gguf": ["gguf>=0.10", "accelerate>=1.1"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy>=1.15",
        "types-PyYAML>=6.0",
        "ruff>=0.12",
        "import-linter>=2.3",
        "pre-commit>=4.0",
        "packaging>=24",
        "setuptools>=77",
    ],
}


def read_version() -> str:
    """`__version__` of the library, read as text: importing it here would need what is not installed yet."""
    text = (HERE / "mellow_ds" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit("mellow_ds/__init__.py has no line __version__ = ...")
    return found.group(1)


def read_readme() -> str:
    """README.md, for the long description."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="mellow-ds",
    version=read_version(),
    description="Pack audio with questions and answers into tar shards and train small audio-language models on them "
    "with DeepSpeed or FSDP, from one CPU to many GPU nodes",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="the mellow-ds authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["audio", "language model", "question answering", "deepspeed", "webdataset", "distributed training"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["mellow_ds", "mellow_ds.*", "shards", "shards.*"]),
    package_data={"mellow_ds": ["recipes/*.yaml"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["mellow-ds = mellow_ds.cli.main:main", "mellow-shards = shards.cli:main"],
    },
)
