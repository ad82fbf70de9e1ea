/* Names that the templates make of their parameters. */
#ifndef NAMING_H
#define NAMING_H

#define KERNEL_NAME_OF(operation, suffix) operation##_##suffix
#define KERNEL_NAME(operation, suffix) KERNEL_NAME_OF(operation, suffix)
#define KERNEL_TEXT_OF(text) #text
#define KERNEL_TEXT(text) KERNEL_TEXT_OF(text)

#endif /* NAMING_H */
