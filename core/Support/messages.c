#include "support.h"

#include <string.h>

static _Thread_local char thread_message[SUPPORT_MESSAGE_BYTES];

char* support_thread_message(void) {
    return thread_message;
}

void support_message_copy(char* message, const char* text, size_t length) {
    if (length >= SUPPORT_MESSAGE_BYTES) {
        length = SUPPORT_MESSAGE_BYTES - 1;
        while (length > 0 && ((unsigned char)text[length] & 0xC0) == 0x80) {
            length--; /* the cut would fall within a character */
        }
    }
    memcpy(message, text, length);
    message[length] = 0;
}
