"""Installs the sources of `src/` as the package `pqf`, with the settings files and our own compressed models inside it."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "src" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
FOLDERS = {
    "pqf.config": "config",
    "pqf.config.cifar10": "config/cifar10",
    "pqf.config.digits": "config/digits",
    "pqf.compressed_models": "compressed_models",
}

setup(
    name="pqf",
    version=VERSION,
    description="Permute, quantize and fine-tune: vision networks 20 to 40 times smaller",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["pqf", *(f"pqf.{name}" for name in find_packages("src")), *FOLDERS],
    package_dir={"pqf": "src", **FOLDERS},
    package_data={
        "pqf.config": ["*.yaml"],
        "pqf.config.cifar10": ["*.yaml"],
        "pqf.config.digits": ["*.yaml"],
        "pqf.compressed_models": ["README.md", "digits_*.pth"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "scipy>=1.11",
        "threadpoolctl>=3.1",
        "numba>=0.60",
        "faiss-cpu>=1.8",
        "pillow>=10",
        "pyyaml>=6",
        "pydantic>=2.7",
        "safetensors>=0.4",
        "tensorboard>=2.14",
        "pycocotools>=2.0.7",
        "tqdm>=4.64",
    ],
    extras_require={
        "demo": ["scikit-learn>=1.3"],
        "faster": ["faster-coco-eval>=1.8"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18"],
        "horovod": ["horovod>=0.28.1"],
        "dev": [
            "scikit-learn>=1.3",
            "faster-coco-eval>=1.8",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "types-tqdm",
            "setuptools>=68",
            "wheel",
        ],
    },
)
