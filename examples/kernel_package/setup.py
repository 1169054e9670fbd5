from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    packages=["brighten"],
    ext_modules=cythonize([Extension("brighten.kernels", ["brighten/kernels.pyx"])]),
)
