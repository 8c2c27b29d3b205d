"""The annotation Space: is this expression a key expression, and is its mask right?"""
