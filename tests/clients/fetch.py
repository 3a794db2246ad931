"""Downloads argv[2] to argv[3] in the way that argv[1] names; any exception is the exit code 1."""

import shutil
import sys
import urllib.request


def write(path, pieces):
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)


def requests_content(url, path):
    import requests

    response = requests.get(url)
    response.raise_for_status()
    write(path, [response.content])


def requests_stream(url, path):
    import requests

    with requests.get(url, stream=True) as response:
        response.raise_for_status()
        write(path, response.iter_content(64 * 1024))


def urlopen_read(url, path):
    with urllib.request.urlopen(url) as response:
        write(path, [response.read()])


def urlretrieve(url, path):
    urllib.request.urlretrieve(url, path)


def copyfileobj(url, path):
    with urllib.request.urlopen(url) as response, open(path, "wb") as file:
        shutil.copyfileobj(response, file)


if __name__ == "__main__":
    way, url, path = sys.argv[1:]
    globals()[way](url, path)
