def test_x(page, tmp_path):
    (tmp_path / "a.html").write_text("<p>hi</p><canvas></canvas>")
    page.goto((tmp_path / "a.html").as_uri())
    assert page.inner_text("p") == "hi"
    assert page.evaluate("!!document.querySelector('canvas').getContext('webgl2')")
def test_y(page, tmp_path):
    (tmp_path / "a.html").write_text("<p>hi</p><img src='http://example.org/x.png'>")
    page.goto((tmp_path / "a.html").as_uri())
def test_z(page, tmp_path):
    (tmp_path / "a.html").write_text("<p>hi</p><script>console.error('x'); throw Error('t')</script>")
    page.goto((tmp_path / "a.html").as_uri())
