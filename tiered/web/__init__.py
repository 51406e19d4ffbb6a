"""The page: `tiered web` serves it from `server`; `page.html` is all of it."""
