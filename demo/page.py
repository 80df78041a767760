"""
Opens the page of serve.py in a real browser, asks it something, and makes the picture of README.

    python serve.py --checkpoint=out/demo/sft --index=out/try/index &
    python -m demo.page --url=http://127.0.0.1:8000 --ask="What is Rite's job?" --out=docs/page.png

It needs `pip install selenium`, and Debian's chromium and chromium-driver or the like.
"""
import time
from dataclasses import dataclass
from typing import Any

from configurator import FilePath, configure
from plumbing.terminal import fail, run


@dataclass(frozen=True)
class Config:
    url: str = "http://127.0.0.1:8000"  # where serve.py listens
    ask: str = "What is Rite's job?"  # what is typed; several questions with | between
    out: FilePath = "docs/page.png"  # the picture
    dark: bool = False  # in dark colours


def browser(width: int = 1000, height: int = 700, dark: bool = False) -> Any:
    """A browser without a window. Raises RuntimeError if there is none."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        raise RuntimeError("needs `pip install selenium`") from None
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                 f"--window-size={width},{height}", *["--force-dark-mode"] * dark):
        options.add_argument(word)
    try:
        return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    except WebDriverException as error:
        raise RuntimeError(f"needs chromium and its driver: {error.msg}") from None


def ask(page: Any, question: str, seconds: float = 120) -> None:
    """Type a question and wait for the end of the reply."""
    page.find_element("id", "input").send_keys(question + "\n")
    until(lambda: page.find_element("id", "stop").get_attribute("hidden") is None
          or page.find_elements("css selector", ".tools"), 10)
    until(lambda: page.find_element("id", "send").is_displayed(), seconds)


def until(true: Any, seconds: float) -> None:
    """Wait until a condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.02)


def main() -> None:
    cfg = configure(Config)
    try:
        page = browser(dark=cfg.dark)
    except RuntimeError as error:
        fail(str(error))
    try:
        page.get(cfg.url)
        for question in cfg.ask.split("|"):
            ask(page, question)
        for source in page.find_elements("css selector", "details.source summary")[-1:]:
            source.click()
        page.save_screenshot(cfg.out)
    finally:
        page.quit()


if __name__ == "__main__":
    run(main)
