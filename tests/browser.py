"What two test files need to look at a page in a browser, if there is one."

import shutil
from http.server import SimpleHTTPRequestHandler

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
FLAGS = (
    '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars '
    '--enable-logging=stderr --v=0'
).split()
LIMIT = 600  # seconds until a browser counts as hanging; it needs one or two


def program():
    "The path of a browser, None without one"
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
