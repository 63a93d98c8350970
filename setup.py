"Everything about the package stands in settings.ini; this file only hands it to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
cfg = ConfigParser()
cfg.read(here / 'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_path']
first = int(cfg['min_python'].split('.')[1])
pythons = [f'Programming Language :: Python :: 3.{minor}' for minor in range(first, 13)]
EXTRAS = 'dev', 'ood', 'onnx', 'distributed', 'cluster'


class Build(build_py):
    "The package, and the weights of the two generators whose images `outliers` knows by name"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        place = Path(self.build_lib) / lib / 'weights'
        place.mkdir(parents=True, exist_ok=True)
        for name in 'gan-tiny-cifar10-s0', 'gan-tiny-cifar100-s0':
            for suffix in '.pt', '.json':
                self.copy_file(str(here / 'weights' / (name + suffix)), str(place / (name + suffix)))


setup(
    cmdclass={'build_py': Build},
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=[lib, f'{lib}.*']),
    # tables and the figure style, wherever a room keeps them
    package_data={'': ['*.mplstyle', '*.csv', '*.toml', '*.json']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        *pythons,
    ],
    zip_safe=False,
)
