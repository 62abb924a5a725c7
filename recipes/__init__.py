"""Ready recipes. They import the library; the library never imports them."""
