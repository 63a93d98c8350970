"Everything about the package stands in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser()
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
pythons = [f'3.{o}' for o in range(int(cfg['min_python'].split('.')[1]), 13)]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', license_files=['LICENSE'], python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: ['*.mplstyle', '*.csv', '*.toml', '*.json', 'study/*.csv', 'study/*.toml', 'study/*.json']},
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split(), 'ood': cfg['ood_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: {o}' for o in pythons)],
    zip_safe=False)
