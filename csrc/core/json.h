// JSON as the headers of files hold it: read from untrusted text in one pass, without a tree.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace ctx::json {

bool is_utf8(std::string_view text);

// A text in quotes, escaped where JSON needs it. The text is UTF-8.
std::string quoted(std::string_view text);

// Goes forward through a text, which must outlive it. Every function throws std::invalid_argument,
// which says what must be where, for anything that is not the value asked for.
class Cursor {
 public:
  explicit Cursor(std::string_view text);

  // Objects and arrays. The function reads each value, with this cursor; no name comes twice.
  void object(const std::function<void(const std::string& name)>& member);
  void array(const std::function<void()>& element);

  std::string string();
  int64_t integer();         // not negative
  std::string_view value();  // any value, as it is written
  void end();                // nothing but white space follows

  // How much has been read.
  size_t place() const { return at_; }

 private:
  static constexpr int kDepth = 16;

  [[noreturn]] void fail(const std::string& must) const;
  char next();
  bool accept(char c);
  void expect(char c);
  void digits();
  void number();
  uint32_t code();
  void escape(std::string& made);

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace ctx::json
