// From the executor's tables to a kernel's own parameter types. The translator knows parameters by number only; their types are taken from
// the kernel itself, so that templates need no work.

#pragma once

#include "library.h"

namespace softmetal {

template <int index, class Head, class... Tail> struct element {
    using type = typename element<index - 1, Tail...>::type;
};
template <class Head, class... Tail> struct element<0, Head, Tail...> {
    using type = Head;
};

template <class Function> struct signature;
template <class... Parameters> struct signature<void (*)(Parameters...)> {
    template <int index> using parameter = typename element<index, Parameters...>::type;
};

template <class T> struct binding;
template <class T> struct binding<T*> {
    static constexpr uint32_t least_size = 1;
    static T* from(void* address) { return static_cast<T*>(address); }
};
template <class T> struct binding<T&> {
    static constexpr uint32_t least_size = sizeof(T);
    static T& from(void* address) { return *static_cast<T*>(address); }
};

// An attribute of one, two or three components as the type that the kernel asks for.
template <class T> inline T attribute(const uint32_t* values) {
    if constexpr (vector_traits<T>::size == 1) {
        return static_cast<T>(values[0]);
    } else {
        T vector;
        for (int axis = 0; axis < vector_traits<T>::size; axis++)
            vector[axis] = static_cast<typename vector_traits<T>::element>(values[axis]);
        return vector;
    }
}
template <class T> inline T attribute(uint32_t value) {
    return static_cast<T>(value);
}

} // namespace softmetal
