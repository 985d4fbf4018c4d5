"""Packaging of recalign_jax. Ranges stand here; the exact versions that CI uses stand in constraints.txt."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
# Beam holds protobuf below 7, for which later versions of sentencepiece are too new.
BEAM = ["apache-beam>=2.77,<3", "sentencepiece>=0.2,<0.2.2"]

# The site of docs/.
DOCS = ["furo>=2025.12", "myst-parser>=5,<6", "sphinx>=9,<10"]

# The TPU compiler, in the version that jax[tpu] takes.
PLAN = "libtpu>=0.0.42,<0.0.43"


def gin_files() -> list[tuple[str, list[str]]]:
    """The gin files as (folder in the installation, files), folder by folder."""
    folders = sorted({path.parent for path in ROOT.glob("gin_configs/**/*.gin")})
    return [
        (str(folder.relative_to(ROOT)), sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.gin")))
        for folder in folders
    ]


setuptools.setup(
    name="recalign_jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "recalign_jax/__init__.py").read_text(encoding="utf-8"))[1],
    description="Turns FLAN-T5 into a recommender, in JAX, on TPU, GPU and CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["recalign_jax", "recalign_jax.*", "seqio_tasks", "seqio_tasks.*"]),
    package_data={"recalign_jax.reporting": ["published.json", "templates/*"]},
    data_files=gin_files(),
    entry_points={"console_scripts": ["recalign = recalign_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "flax>=0.12.8,<0.13",
        "gin-config>=0.5",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        # TensorFlow Datasets imports it and doesn't say so.
        "importlib_resources>=6.4",
        "jax>=0.10.2,<0.11",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "markupsafe>=2.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pyarrow>=18",
        "requests>=2.32",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "scipy>=1.13",
        "seqio>=0.0.20",
        "tensorboardX>=2.6",
        "tensorflow>=2.21,<2.22",
        "tensorflow-datasets>=4.9.10",
        # 2.21.0 can't be imported (an ICU symbol is missing in it).
        "tensorflow-text>=2.21.1,<2.22",
        "tensorstore>=0.1.70",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            *BEAM,
            *DOCS,
            "hypothesis>=6.100",
            PLAN,
            "mypy>=1.11",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ranx>=0.3.20",
            "ruff>=0.6",
            "scikit-learn>=1.5",
            "torch>=2.5",
        ],
        "beam": BEAM,
        "docs": DOCS,
        # What T5X's git heads import beside our own requirements; see docs/t5x.md.
        "t5x": ["cached_property>=2.0", "chex>=0.1.92", "fiddle>=0.3.1", "jaxtyping>=0.3.11", "tensorboard>=2.21"],
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan": [PLAN],
    },
)
