#include "core/json.h"

#include <charconv>
#include <set>
#include <stdexcept>

namespace ctx::json {
namespace {

void append_utf8(std::string& made, uint32_t code) {
  const auto tail = [&](int shift) { made += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
  if (code < 0x80) {
    made += static_cast<char>(code);
  } else if (code < 0x800) {
    made += static_cast<char>(0xc0 | (code >> 6)), tail(0);
  } else if (code < 0x10000) {
    made += static_cast<char>(0xe0 | (code >> 12)), tail(6), tail(0);
  } else {
    made += static_cast<char>(0xf0 | (code >> 18)), tail(12), tail(6), tail(0);
  }
}

}  // namespace

// RFC 3629: neither overlong forms nor surrogates.
bool is_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const int first = byte(0);
    const size_t size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if ((first >= 0x80 && first < 0xc2) || first > 0xf4 || size > text.size() - at) return false;
    for (size_t i = 1; i < size; ++i) {
      if ((byte(i) & 0xc0) != 0x80) return false;
    }
    if ((first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) >= 0xa0) ||
        (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) >= 0x90)) {
      return false;
    }
    at += size;
  }
  return true;
}

std::string quoted(std::string_view text) {
  constexpr const char* hex = "0123456789abcdef";
  std::string made = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      made += '\\', made += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      made += "\\u00", made += hex[c >> 4], made += hex[c & 15];
    } else {
      made += c;
    }
  }
  return made + '"';
}

Cursor::Cursor(std::string_view text) : text_(text) {
  if (!is_utf8(text)) fail("UTF-8");
}

void Cursor::fail(const std::string& must) const {
  throw std::invalid_argument("JSON must have " + must + ", got another at byte " +
                              std::to_string(at_));
}

// The next character that is no white space; 0: there is none.
char Cursor::next() {
  while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string::npos)
    ++at_;
  return at_ < text_.size() ? text_[at_] : '\0';
}

bool Cursor::accept(char c) {
  if (next() != c) return false;
  ++at_;
  return true;
}

void Cursor::expect(char c) {
  if (!accept(c)) fail(std::string("a ") + c);
}

void Cursor::end() {
  next();
  if (at_ != text_.size()) fail("an end");
}

void Cursor::object(const std::function<void(const std::string& name)>& member) {
  if (++depth_ > kDepth) fail("at most " + std::to_string(kDepth) + " levels");
  expect('{');
  std::set<std::string> names;
  if (!accept('}')) {
    do {
      next();
      const std::string name = string();
      if (!names.insert(name).second) fail("a name once in an object");
      expect(':');
      member(name);
    } while (accept(','));
    expect('}');
  }
  --depth_;
}

void Cursor::array(const std::function<void()>& element) {
  if (++depth_ > kDepth) fail("at most " + std::to_string(kDepth) + " levels");
  expect('[');
  if (!accept(']')) {
    do {
      element();
    } while (accept(','));
    expect(']');
  }
  --depth_;
}

std::string Cursor::string() {
  expect('"');
  std::string made;
  for (;;) {
    if (at_ == text_.size()) fail("an end of every string");
    const char c = text_[at_++];
    if (c == '"') return made;
    if (static_cast<unsigned char>(c) < 0x20) fail("strings without control characters");
    if (c == '\\') {
      escape(made);
    } else {
      made += c;
    }
  }
}

void Cursor::escape(std::string& made) {
  constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
  const char letter = at_ < text_.size() ? text_[at_++] : '\0';
  if (const size_t found = letters.find(letter); found != std::string::npos) {
    made += meant[found];
    return;
  }
  if (letter != 'u') fail("an escape that it knows");
  uint32_t point = code();
  if (point >= 0xd800 && point < 0xe000) {  // beyond 16 bits: a high half, then a low one
    const bool pair = point < 0xdc00 && text_.substr(at_, 2) == "\\u";
    at_ += pair ? 2 : 0;
    const uint32_t low = pair ? code() : 0;
    if (low < 0xdc00 || low >= 0xe000) fail("both halves of a surrogate pair");
    point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(made, point);
}

// Four hexadecimal digits.
uint32_t Cursor::code() {
  uint32_t made = 0;
  const std::string_view four = text_.substr(at_, 4);
  const auto [end, error] = std::from_chars(four.data(), four.data() + four.size(), made, 16);
  if (error != std::errc() || four.size() != 4 || end != four.data() + 4) fail("four digits");
  at_ += 4;
  return made;
}

int64_t Cursor::integer() {
  next();
  const size_t begin = at_;
  digits();
  int64_t made = 0;
  const auto [end, error] = std::from_chars(text_.data() + begin, text_.data() + at_, made);
  if (error != std::errc()) fail("integers of 63 bits");
  return made;
}

// Of an integer: no zero before others.
void Cursor::digits() {
  const size_t begin = at_;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
  if (at_ == begin || (text_[begin] == '0' && at_ - begin > 1)) fail("a number");
}

void Cursor::number() {
  const auto one_of = [&](std::string_view any) {
    const bool found = at_ < text_.size() && any.find(text_[at_]) != std::string::npos;
    at_ += found;
    return found;
  };
  const auto some = [&] {
    if (!one_of("0123456789")) fail("a number");
    while (one_of("0123456789")) continue;
  };
  one_of("-");
  digits();
  if (one_of(".")) some();
  if (one_of("eE")) one_of("+-"), some();
}

std::string_view Cursor::value() {
  const char first = next();
  const size_t begin = at_;
  if (first == '{') {
    object([&](const std::string&) { value(); });
  } else if (first == '[') {
    array([&] { value(); });
  } else if (first == '"') {
    string();
  } else if (first == 't' || first == 'f' || first == 'n') {
    const std::string_view word = first == 't' ? "true" : first == 'f' ? "false" : "null";
    if (text_.substr(at_, word.size()) != word) fail("a value");
    at_ += word.size();
  } else {
    number();
  }
  return text_.substr(begin, at_ - begin);
}

}  // namespace ctx::json
