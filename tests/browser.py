"""
Opens the page of serve.py in a real browser, asks it something, and makes the picture of README.

    python serve.py --checkpoint=out/demo/sft --index=out/try/index &
    python -m tests.browser --questions="What is Tifo's job?" --picture=docs/page.png

It needs `pip install selenium`, and chromium with chromedriver in /usr/bin, as Debian has them.
"""
import time
from dataclasses import dataclass
from typing import Any

from configurator import FilePath, configure
from plumbing.terminal import fail, run


@dataclass(frozen=True)
class Config:
    address: str = "http://127.0.0.1:8000"  # where serve.py listens
    questions: str = "What is Tifo's job?"  # what is typed; several with | between
    picture: FilePath = "docs/page.png"  # file of the picture


def browser(width: int = 1000, height: int = 700) -> Any:
    """A browser without a window. Raises RuntimeError if there is none."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        raise RuntimeError("needs `pip install selenium`") from None
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                 f"--window-size={width},{height}"):
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
        page = browser()
    except RuntimeError as error:
        fail(str(error))
    try:
        page.get(cfg.address)
        for question in cfg.questions.split("|"):
            ask(page, question)
        for source in page.find_elements("css selector", "details.source summary")[-1:]:
            source.click()
        page.save_screenshot(cfg.picture)
    finally:
        page.quit()


if __name__ == "__main__":
    run(main)
