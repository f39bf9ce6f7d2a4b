"""The page of the API, in a browser."""

from playwright.sync_api import expect


def test_the_description_of_the_api_opens(queue, visit):
    """Swagger UI lists the routes, with nothing from elsewhere and no error in the console."""
    seen = visit(queue, "docs")
    expect(seen.page.locator("#ui .opblock").first).to_be_visible(timeout=15_000)
